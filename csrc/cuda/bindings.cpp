// The door between Python and the CUDA ops: as csrc/bindings.cpp, with tensors on the device, a workspace that the
// caller allocates and the stream as an integer. One bind_<op> function an op.
#include "bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>

#include "../dlpack.h"
#include "sdw/behavior_matching.h"
#include "sdw/scale.h"
#include "sdw/unrolled_bc_cuda.h"
#include "sdw/weighted_bc_loss.h"

namespace py = pybind11;

namespace sdw {
namespace {

// Where the tensors lie, as DLPack counts devices; under emulation that is the host.
#ifdef SDW_EMULATE_CUDA
constexpr int kDevice = 1;
#else
constexpr int kDevice = 2;
#endif

void require(bool condition, const char* message) {
    if (!condition) throw py::value_error(message);
}

void* as_stream(uintptr_t stream) { return reinterpret_cast<void*>(stream); }

// The caller's workspace, of at least as many bytes.
void* workspace_of(const TensorView<uint8_t>& workspace, size_t bytes) {
    require(static_cast<size_t>(workspace.size(0)) >= bytes, "the workspace is too small");
    return workspace.data();
}

void bind_behavior_matching(py::module_& m) {
    m.def("behavior_matching_cuda_workspace", &behavior_matching_cuda_workspace, py::arg("rows"), py::arg("widths"),
          py::arg("want_gradients"));
    m.def(
        "behavior_matching_cuda",
        [](const py::sequence& params, const py::object& states, const py::object& targets, const py::object& weights,
           const py::object& loss, const py::object& gradients, const py::object& workspace, bool ieee,
           uintptr_t stream) {
            const TensorView<float> s(states, "states", 2, kDevice), y(targets, "targets", 2, kDevice),
                w(weights, "weights", 1, kDevice), result(loss, "loss", 1, kDevice);
            require(s.size(0) >= 1 && y.size(0) == s.size(0) && w.size(0) == s.size(0), "rows must agree");
            require(params.size() >= 2 && params.size() % 2 == 0, "params must be [W1, b1, W2, b2, ...]");
            std::vector<int64_t> widths{s.size(1)};
            std::vector<TensorView<float>> views;
            int64_t numbers = 0;
            for (size_t i = 0; i < params.size(); ++i) {
                const bool weight = i % 2 == 0;
                const auto& view = views.emplace_back(params[i], "params", weight ? 2 : 1, kDevice);
                if (weight) {
                    require(view.size(1) == widths.back(), "params must fit one layer to the next");
                    widths.push_back(view.size(0));
                }
                require(view.size(0) == widths.back(), "a layer's bias must have a number an output");
                numbers += view.size(0) * (weight ? view.size(1) : 1);
            }
            require(*std::min_element(widths.begin(), widths.end()) >= 1, "layers must not be empty");
            require(y.size(1) == widths.back(), "targets must have a column an output");
            std::vector<const float*> pointers;
            for (const auto& view : views) pointers.push_back(view.data());
            std::unique_ptr<TensorView<float>> g;
            if (!gradients.is_none()) {
                g = std::make_unique<TensorView<float>>(gradients, "gradients", 1, kDevice);
                require(g->size(0) == numbers, "gradients must have a number a parameter");
            }
            const TensorView<uint8_t> space(workspace, "workspace", 1, kDevice);
            behavior_matching_cuda(
                {s.size(0), widths, pointers, s.data(), y.data(), w.data(), g ? g->data() : nullptr, result.data(),
                 ieee, workspace_of(space, behavior_matching_cuda_workspace(s.size(0), widths, g != nullptr)),
                 as_stream(stream)});
        },
        py::arg("params"), py::arg("states"), py::arg("targets"), py::arg("weights"), py::arg("loss"),
        py::arg("gradients"), py::arg("workspace"), py::arg("ieee"), py::arg("stream"));
}

void bind_scale(py::module_& m) {
    m.def(
        "scale_cuda",
        [](const py::object& values, const py::object& factor, uintptr_t stream) {
            const TensorView<float> x(values, "values", 1, kDevice), f(factor, "factor", 1, kDevice);
            require(x.size(0) >= 1 && f.size(0) == 1, "values must not be empty, and factor must be one number");
            scale_cuda(x.data(), x.size(0), f.data(), as_stream(stream));
        },
        py::arg("values"), py::arg("factor"), py::arg("stream"));
}

// The address of a tensor of `problems` parts of `size` numbers, or null for None.
float* optional(const py::object& tensor, const char* name, int64_t problems, int64_t size) {
    if (tensor.is_none()) return nullptr;
    const TensorView<float> view(tensor, name, 2, kDevice);
    require(view.size(0) == problems && view.size(1) == size, "tensors must have a row a problem");
    return view.data();
}

void bind_unrolled_bc(py::module_& m) {
    using Problem = UnrolledBCCudaProblem;
    const auto flat = [](const Problem& p) {
        int64_t size = 0;
        for (size_t l = 0; l + 1 < p.widths.size(); ++l) size += p.widths[l + 1] * (p.widths[l] + 1);
        return size;
    };
    // Local: tests load the emulated ops beside the package's own.
    py::class_<Problem>(m, "UnrolledBCCudaProblem", py::module_local())
        .def(py::init([](int64_t problems, int64_t rows, std::vector<int64_t> widths, int64_t steps, int64_t window,
                         float momentum, bool keep_tape, bool recompute, bool ieee) {
                 Problem p{problems, rows, std::move(widths), steps, window, momentum, keep_tape, recompute, ieee};
                 unrolled_bc_cuda_workspace(p);  // refuses what the kernels do not take
                 return p;
             }),
             py::kw_only(), py::arg("problems"), py::arg("rows"), py::arg("widths"), py::arg("steps"),
             py::arg("window"), py::arg("momentum"), py::arg("keep_tape"), py::arg("recompute"), py::arg("ieee"))
        .def_property_readonly("workspace", &unrolled_bc_cuda_workspace);
    m.def(
        "unrolled_bc_cuda",
        [flat](const Problem& problem, const py::object& observations, const py::object& actions,
               const py::object& params, const py::object& lr, const py::object& trained, const py::object& workspace,
               uintptr_t stream) {
            const auto matrix = [&](const py::object& tensor, const char* name, int64_t size) {
                require(!tensor.is_none(), "a tensor is missing");
                return optional(tensor, name, problem.problems, size);
            };
            const TensorView<uint8_t> space(workspace, "workspace", 1, kDevice);
            unrolled_bc_cuda({problem, matrix(observations, "observations", problem.rows * problem.widths.front()),
                              matrix(actions, "actions", problem.rows * problem.widths.back()),
                              matrix(params, "params", flat(problem)), matrix(lr, "lr", 1),
                              matrix(trained, "trained", flat(problem)),
                              workspace_of(space, unrolled_bc_cuda_workspace(problem)), as_stream(stream)});
        },
        py::arg("problem"), py::arg("observations"), py::arg("actions"), py::arg("params"), py::arg("lr"),
        py::arg("trained"), py::arg("workspace"), py::arg("stream"));
    m.def(
        "unrolled_bc_cuda_backward",
        [flat](const Problem& problem, bool again, const py::object& grad_trained, const py::object& lr,
               const py::object& grad_observations, const py::object& grad_actions, const py::object& grad_params,
               const py::object& grad_lr, const py::object& workspace, uintptr_t stream) {
            const auto matrix = [&](const py::object& tensor, const char* name, int64_t size) {
                return optional(tensor, name, problem.problems, size);
            };
            require(!grad_trained.is_none() && !lr.is_none() && !grad_lr.is_none(), "a tensor is missing");
            require(problem.keep_tape, "the forward pass kept no tape");
            const TensorView<uint8_t> space(workspace, "workspace", 1, kDevice);
            unrolled_bc_cuda_backward(
                {problem, again, matrix(grad_trained, "grad_trained", flat(problem)), matrix(lr, "lr", 1),
                 matrix(grad_observations, "grad_observations", problem.rows * problem.widths.front()),
                 matrix(grad_actions, "grad_actions", problem.rows * problem.widths.back()),
                 matrix(grad_params, "grad_params", flat(problem)), matrix(grad_lr, "grad_lr", 1),
                 workspace_of(space, unrolled_bc_cuda_workspace(problem)), as_stream(stream)});
        },
        py::arg("problem"), py::arg("again"), py::arg("grad_trained"), py::arg("lr"), py::arg("grad_observations"),
        py::arg("grad_actions"), py::arg("grad_params"), py::arg("grad_lr"), py::arg("workspace"), py::arg("stream"));
}

void bind_weighted_bc_loss(py::module_& m) {
    m.def("weighted_bc_loss_cuda_workspace", &weighted_bc_loss_cuda_workspace, py::arg("rows"), py::arg("columns"));
    m.def(
        "weighted_bc_loss_cuda",
        [](const py::object& pred, const py::object& target, const py::object& weights, const py::object& loss,
           const py::object& gradient, const py::object& workspace, uintptr_t stream) {
            const TensorView<float> x(pred, "pred", 2, kDevice), y(target, "target", 2, kDevice),
                w(weights, "weights", 1, kDevice), result(loss, "loss", 1, kDevice);
            require(x.size(0) >= 1 && x.size(1) >= 1 && x.size(1) < int64_t{1} << 31, "pred must not be empty");
            require(y.size(0) == x.size(0) && y.size(1) == x.size(1) && w.size(0) == x.size(0), "shapes must agree");
            std::unique_ptr<TensorView<float>> g;
            if (!gradient.is_none()) {
                g = std::make_unique<TensorView<float>>(gradient, "gradient", 2, kDevice);
                require(g->size(0) == x.size(0) && g->size(1) == x.size(1), "gradient must have the shape of pred");
            }
            const TensorView<uint8_t> space(workspace, "workspace", 1, kDevice);
            weighted_bc_loss_cuda(
                {x.size(0), x.size(1), x.data(), y.data(), w.data(), g ? g->data() : nullptr, result.data(),
                 workspace_of(space, weighted_bc_loss_cuda_workspace(x.size(0), x.size(1))), as_stream(stream)});
        },
        py::arg("pred"), py::arg("target"), py::arg("weights"), py::arg("loss"), py::arg("gradient"),
        py::arg("workspace"), py::arg("stream"));
}

}  // namespace

void bind_cuda(pybind11::module_& m) {
    bind_behavior_matching(m);
    bind_scale(m);
    bind_unrolled_bc(m);
    bind_weighted_bc_loss(m);
}

}  // namespace sdw
