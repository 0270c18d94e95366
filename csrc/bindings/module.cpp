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

// Needs no global lock, and importing it leaves Python's off where there is none (3.13t, 3.14t). What calls share is
// behind a mutex of its own (kept memory, idle workers, a tape's backward pass), atomic (the number of threads) or
// written once (the instruction set). All else is a call's own: with a lock, too, kernels run side by side without it
// (gil.h).
PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
    m.doc() = "Compiled kernels of sdw_fast; use sdw_fast.ops.";
    sdw::bind_runtime(m);
    sdw::bind_behavior_matching(m);
    sdw::bind_knn(m);
    sdw::bind_scale(m);
    sdw::bind_unrolled_bc(m);
    sdw::bind_weighted_bc_loss(m);
}
