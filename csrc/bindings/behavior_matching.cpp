// behavior_matching as Python sees it, the same on both devices: tensors by DLPack, parameters flat (sdw/flat.h).
#include "sdw/behavior_matching.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "gil.h"
#include "head.h"
#include "sdw/flat.h"
#include "sdw/isa.h"
#include "views.h"

namespace py = pybind11;

namespace sdw {
namespace {

using Op = void (*)(const BehaviorMatchingParams&);
using WorkspaceSize = size_t (*)(int64_t rows, const std::vector<int64_t>& widths, bool want_gradients);

// The op of one device; workspace_size is null where it needs none.
void define(py::module_& m, const char* name, int device, Op op, WorkspaceSize workspace_size) {
    m.def(
        name,
        [device, op, workspace_size](const std::vector<int64_t>& widths, const std::string& head,
                                     const py::object& params, const py::object& states, const py::object& targets,
                                     const py::object& weights, const py::object& losses, const py::object& gradients,
                                     bool ieee, const py::object& workspace, uintptr_t stream) {
            require(widths.size() >= 2 && *std::min_element(widths.begin(), widths.end()) >= 1,
                    "widths must name at least one layer, and none that is empty");
            const TensorView<float> w(weights, "weights", 2, device);
            const int64_t problems = w.size(0), rows = w.size(1), flat = flat_size(widths);
            require(problems >= 1 && rows >= 1, "weights must not be empty");
            const Floats theta(params, "params", {problems, flat}, device),
                s(states, "states", {problems, rows, widths.front()}, device),
                y(targets, "targets", {problems, rows, widths.back()}, device),
                result(losses, "losses", {problems}, device), g(gradients, "gradients", {problems, flat}, device, true);
            std::optional<Workspace> space;
            if (workspace_size != nullptr) space.emplace(workspace, workspace_size(rows, widths, g.data() != nullptr));
            BehaviorMatchingParams p;
            p.problems = problems;
            p.rows = rows;
            p.widths = widths;
            p.head = head_named(head);
            p.params = theta.data();
            p.states = s.data();
            p.targets = y.data();
            p.weights = w.data();
            p.losses = result.data();
            p.gradients = g.data();
            p.threads = num_threads();
            p.ieee = ieee;
            p.workspace = space ? space->data() : nullptr;
            p.stream = reinterpret_cast<void*>(stream);
            const WithoutGil without_gil;
            op(p);
        },
        py::arg("widths"), py::arg("head"), py::arg("params"), py::arg("states"), py::arg("targets"),
        py::arg("weights"), py::arg("losses"), py::arg("gradients"), py::arg("ieee") = false,
        py::arg("workspace") = py::none(), py::arg("stream") = 0);
}

}  // namespace

void bind_behavior_matching(py::module_& m) {
#ifndef SDW_EMULATE_CUDA
    define(m, "behavior_matching_cpu", kHost, behavior_matching_cpu, nullptr);
#endif
#ifdef SDW_WITH_CUDA
    define(m, "behavior_matching_cuda", kDevice, behavior_matching_cuda, behavior_matching_cuda_workspace);
    m.def("behavior_matching_cuda_workspace", &behavior_matching_cuda_workspace, py::arg("rows"), py::arg("widths"),
          py::arg("want_gradients"));
#endif
}

}  // namespace sdw
