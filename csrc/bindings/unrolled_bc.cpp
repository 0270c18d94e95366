// unrolled_bc as Python sees it, the same on both devices: tensors by DLPack, parameters flat (sdw/flat.h).
#include "sdw/unrolled_bc.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>

#include "gil.h"
#include "head.h"
#include "sdw/flat.h"
#include "sdw/isa.h"
#include "views.h"

namespace py = pybind11;

namespace sdw {
namespace {

// The tape, and what it must find in place: the learning rates and, on CUDA, the workspace.
struct PyTape {
    std::unique_ptr<UnrolledBCTape> tape;
    UnrolledBCParams params;
    int device;
    py::object lr, workspace;

    void backward(const py::object& grad_trained, const py::object& grad_observations, const py::object& grad_actions,
                  const py::object& grad_params, const py::object& grad_lr, uintptr_t stream) const {
        const int64_t problems = params.problems, flat = flat_size(params.widths);
        const Floats trained(grad_trained, "grad_trained", {problems, flat}, device),
            observations(grad_observations, "grad_observations", {problems, params.rows, params.widths.front()}, device,
                         true),
            actions(grad_actions, "grad_actions", {problems, params.rows, params.widths.back()}, device, true),
            start(grad_params, "grad_params", {problems, flat}, device, true),
            rates(grad_lr, "grad_lr", {problems}, device);
        UnrolledBCGradients g;
        g.trained = trained.data();
        g.observations = observations.data();
        g.actions = actions.data();
        g.params = start.data();
        g.lr = rates.data();
        g.threads = num_threads();
        g.stream = reinterpret_cast<void*>(stream);
        const WithoutGil without_gil;
        tape->backward(g);
    }
};

// All but where the tensors are.
UnrolledBCParams options_of(int64_t problems, int64_t rows, const std::vector<int64_t>& widths, int64_t steps,
                            int64_t window, const std::string& head, float momentum, bool keep_tape, bool recompute,
                            bool ieee) {
    require(problems >= 1 && rows >= 1, "problems and rows must be at least 1");
    require(widths.size() >= 2 && *std::min_element(widths.begin(), widths.end()) >= 1,
            "widths must name at least one layer, and none that is empty");
    require(steps >= 1 && window >= 1 && window <= steps, "1 <= window <= steps is required");
    UnrolledBCParams p;
    p.problems = problems;
    p.rows = rows;
    p.widths = widths;
    p.steps = steps;
    p.window = window;
    p.head = head_named(head);
    p.momentum = momentum;
    p.keep_tape = keep_tape;
    p.recompute = recompute;
    p.ieee = ieee;
    return p;
}

using Op = std::unique_ptr<UnrolledBCTape> (*)(const UnrolledBCParams&);

// The op of one device; workspace_size is null where it needs none.
void define(py::module_& m, const char* name, int device, Op op, size_t (*workspace_size)(const UnrolledBCParams&)) {
    m.def(
        name,
        [device, op, workspace_size](const UnrolledBCParams& options, const py::object& observations,
                                     const py::object& actions, const py::object& params, const py::object& lr,
                                     const py::object& trained, const py::object& workspace,
                                     uintptr_t stream) -> std::optional<PyTape> {
            UnrolledBCParams p = options;
            const int64_t flat = flat_size(p.widths);
            const Floats s(observations, "observations", {p.problems, p.rows, p.widths.front()}, device),
                a(actions, "actions", {p.problems, p.rows, p.widths.back()}, device),
                start(params, "params", {p.problems, flat}, device), rates(lr, "lr", {p.problems}, device),
                end(trained, "trained", {p.problems, flat}, device);
            std::optional<Workspace> space;
            if (workspace_size != nullptr) space.emplace(workspace, workspace_size(p));
            p.observations = s.data();
            p.actions = a.data();
            p.params = start.data();
            p.lr = rates.data();
            p.trained = end.data();
            p.threads = num_threads();
            p.workspace = space ? space->data() : nullptr;
            p.stream = reinterpret_cast<void*>(stream);
            std::unique_ptr<UnrolledBCTape> tape;
            {
                const WithoutGil without_gil;
                tape = op(p);
            }
            if (tape == nullptr) return std::nullopt;
            return PyTape{std::move(tape), std::move(p), device, lr, workspace};
        },
        py::arg("options"), py::arg("observations"), py::arg("actions"), py::arg("params"), py::arg("lr"),
        py::arg("trained"), py::arg("workspace") = py::none(), py::arg("stream") = 0);
}

}  // namespace

void bind_unrolled_bc(py::module_& m) {
    // Local: tests load the emulated ops beside the package's own. Made by functions and returned by value, as pybind11
    // frees what a constructor made twice, or ends the process, if memory runs out while it registers the object.
    py::class_<UnrolledBCParams>(m, "UnrolledBCParams", py::module_local());
    m.def("UnrolledBCOptions", &options_of, py::kw_only(), py::arg("problems"), py::arg("rows"), py::arg("widths"),
          py::arg("steps"), py::arg("window"), py::arg("head"), py::arg("momentum"), py::arg("keep_tape"),
          py::arg("recompute"), py::arg("ieee"));
    py::class_<PyTape>(m, "UnrolledBCTape", py::module_local())
        .def("backward", &PyTape::backward, py::arg("grad_trained"), py::arg("grad_observations"),
             py::arg("grad_actions"), py::arg("grad_params"), py::arg("grad_lr"), py::arg("stream") = 0);
#ifndef SDW_EMULATE_CUDA
    define(m, "unrolled_bc_cpu", kHost, unrolled_bc_cpu, nullptr);
    m.def("unrolled_bc_cpu_memory", &unrolled_bc_cpu_memory, py::arg("options"));
#endif
#ifdef SDW_WITH_CUDA
    define(m, "unrolled_bc_cuda", kDevice, unrolled_bc_cuda, unrolled_bc_cuda_workspace);
    m.def("unrolled_bc_cuda_workspace", &unrolled_bc_cuda_workspace, py::arg("options"));
#endif
}

}  // namespace sdw
