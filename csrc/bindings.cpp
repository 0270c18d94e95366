// The door between Python and the kernels: takes tensors by DLPack, checks them, releases the GIL, calls the op.
// No arithmetic here. One bind_<op> function an op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dlpack.h"
#include "sdw/isa.h"
#ifdef SDW_WITH_CUDA
#include "sdw/cuda_device.h"
#endif

namespace py = pybind11;

namespace {

void bind_runtime(py::module_& m) {
    m.def("active_isa", [] { return std::string(sdw::isa_name(sdw::active_isa())); });
    m.def("supported_isas", [] {
        std::vector<std::string> names;
        for (sdw::Isa isa : sdw::supported_isas()) names.emplace_back(sdw::isa_name(isa));
        return names;
    });
    m.def("num_threads", &sdw::num_threads);
    m.def("set_num_threads", &sdw::set_num_threads, py::arg("threads"));
#ifdef SDW_WITH_CUDA
    m.attr("has_cuda") = true;
    m.def("cuda_device_description", &sdw::cuda_device_description);
    m.def("cuda_runtime_version", &sdw::cuda_runtime_version);
#else
    m.attr("has_cuda") = false;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of sdw_fast; use sdw_fast.ops.";
    bind_runtime(m);
}
