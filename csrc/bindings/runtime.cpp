// What the kernels run on, as Python sees it: instruction set, threads, CUDA.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "sdw/isa.h"
#include "sdw/openmp.h"
#ifdef SDW_WITH_CUDA
#include "sdw/cuda_device.h"
#endif

namespace py = pybind11;

namespace sdw {

void bind_runtime(py::module_& m) {
    m.def("active_isa", [] { return std::string(isa_name(active_isa())); });
    m.def("supported_isas", [] {
        std::vector<std::string> names;
        for (const Isa isa : supported_isas()) names.emplace_back(isa_name(isa));
        return names;
    });
    m.def("num_threads", &num_threads);
    m.def(
        "set_num_threads",
        [](int threads, bool shared) {
            set_num_threads(threads);
            share_openmp(shared);
        },
        py::arg("threads"), py::arg("shared") = false);
    m.def(
        "set_openmp",
        [](uintptr_t parallel, uintptr_t num_threads, uintptr_t thread_num, uintptr_t in_parallel) {
            OpenMP runtime;
            runtime.parallel = reinterpret_cast<decltype(runtime.parallel)>(parallel);
            runtime.num_threads = reinterpret_cast<decltype(runtime.num_threads)>(num_threads);
            runtime.thread_num = reinterpret_cast<decltype(runtime.thread_num)>(thread_num);
            runtime.in_parallel = reinterpret_cast<decltype(runtime.in_parallel)>(in_parallel);
            set_openmp(runtime);
        },
        py::arg("parallel"), py::arg("num_threads"), py::arg("thread_num"), py::arg("in_parallel"));
#ifdef SDW_WITH_CUDA
    m.attr("has_cuda") = true;
    m.def("cuda_device_description", &cuda_device_description);
    m.def("cuda_architectures", &cuda_architectures);
    m.def("cuda_obstacle", &cuda_obstacle, py::arg("device"));
    m.def("cuda_runtime_version", &cuda_runtime_version);
#else
    m.attr("has_cuda") = false;
    m.attr("cuda_left_out") = SDW_CUDA_LEFT_OUT;  // why, for a user who expected it
#endif
}

}  // namespace sdw
