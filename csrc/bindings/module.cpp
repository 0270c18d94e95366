// The door between Python and the kernels: sdw_fast._C. Each op's file here takes tensors by DLPack, checks them,
// releases the GIL and calls the op; no arithmetic.
#include <pybind11/pybind11.h>

namespace sdw {

void bind_behavior_matching(pybind11::module_& m);
void bind_knn(pybind11::module_& m);
void bind_runtime(pybind11::module_& m);
void bind_scale(pybind11::module_& m);
void bind_unrolled_bc(pybind11::module_& m);
void bind_weighted_bc_loss(pybind11::module_& m);

}  // namespace sdw

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of sdw_fast; use sdw_fast.ops.";
    sdw::bind_runtime(m);
    sdw::bind_behavior_matching(m);
    sdw::bind_knn(m);
    sdw::bind_scale(m);
    sdw::bind_unrolled_bc(m);
    sdw::bind_weighted_bc_loss(m);
}
