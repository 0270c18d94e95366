// Gradients scaled on a CUDA device as Python sees it; the other devices' are scaled by PyTorch.
#include "sdw/scale.h"

#include <pybind11/pybind11.h>

#include "views.h"

namespace py = pybind11;

namespace sdw {

void bind_scale([[maybe_unused]] py::module_& m) {
#ifdef SDW_WITH_CUDA
    m.def(
        "scale_cuda",
        [](const py::object& values, const py::object& factors, uintptr_t stream) {
            const TensorView<float> x(values, "values", 2, kDevice);
            require(x.size(0) >= 1 && x.size(1) >= 1, "values must not be empty");
            const Floats f(factors, "factors", {x.size(0)}, kDevice);
            ScaleParams p;
            p.rows = x.size(0);
            p.columns = x.size(1);
            p.values = x.data();
            p.factors = f.data();
            p.stream = reinterpret_cast<void*>(stream);
            scale_cuda(p);
        },
        py::arg("values"), py::arg("factors"), py::arg("stream"));
#endif
}

}  // namespace sdw
