// weighted_bc_loss as Python sees it, the same on both devices: tensors by DLPack.
#include "sdw/weighted_bc_loss.h"

#include <pybind11/pybind11.h>

#include "gil.h"
#include "sdw/isa.h"
#include "views.h"

namespace py = pybind11;

namespace sdw {
namespace {

using Op = void (*)(const WeightedBCLossParams&);

// The op of one device; workspace_size is null where it needs none.
void define(py::module_& m, const char* name, int device, Op op, size_t (*workspace_size)(int64_t, int64_t)) {
    m.def(
        name,
        [device, op, workspace_size](const py::object& pred, const py::object& target, const py::object& weights,
                                     const py::object& loss, const py::object& gradient, const py::object& workspace,
                                     uintptr_t stream) {
            const TensorView<float> x(pred, "pred", 2, device);
            const int64_t rows = x.size(0), columns = x.size(1);
            require(rows >= 1 && columns >= 1 && columns < int64_t{1} << 31,
                    "pred must have at least one row, and 1 to 2^31 - 1 columns");
            const Floats y(target, "target", {rows, columns}, device), w(weights, "weights", {rows}, device),
                result(loss, "loss", {1}, device), g(gradient, "gradient", {rows, columns}, device, true);
            std::optional<Workspace> space;
            if (workspace_size != nullptr) space.emplace(workspace, workspace_size(rows, columns));
            WeightedBCLossParams p;
            p.rows = rows;
            p.columns = columns;
            p.pred = x.data();
            p.target = y.data();
            p.weights = w.data();
            p.loss = result.data();
            p.gradient = g.data();
            p.threads = num_threads();
            p.workspace = space ? space->data() : nullptr;
            p.stream = reinterpret_cast<void*>(stream);
            const WithoutGil without_gil;
            op(p);
        },
        py::arg("pred"), py::arg("target"), py::arg("weights"), py::arg("loss"), py::arg("gradient"),
        py::arg("workspace") = py::none(), py::arg("stream") = 0);
}

}  // namespace

void bind_weighted_bc_loss(py::module_& m) {
#ifndef SDW_EMULATE_CUDA
    define(m, "weighted_bc_loss_cpu", kHost, weighted_bc_loss_cpu, nullptr);
#endif
#ifdef SDW_WITH_CUDA
    define(m, "weighted_bc_loss_cuda", kDevice, weighted_bc_loss_cuda, weighted_bc_loss_cuda_workspace);
    m.def("weighted_bc_loss_cuda_workspace", &weighted_bc_loss_cuda_workspace, py::arg("rows"), py::arg("columns"));
#endif
}

}  // namespace sdw
