// The door between Python and the kernels: takes tensors by DLPack, checks them, releases the GIL, calls the op.
// No arithmetic here. One bind_<op> function an op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>

#include "dlpack.h"
#include "sdw/behavior_matching.h"
#include "sdw/isa.h"
#include "sdw/unrolled_bc.h"
#include "sdw/weighted_bc_loss.h"
#ifdef SDW_WITH_CUDA
#include "cuda/bindings.h"
#include "sdw/cuda_device.h"
#endif

namespace py = pybind11;

namespace sdw {
void bind_knn(py::module_& m);  // csrc/bindings/knn.cpp, both devices
}

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

// A list of parameters [W1, b1, ...] that must have the shapes that `widths` say; keeps the views alive.
class ParamViews {
  public:
    ParamViews(const py::sequence& tensors, const char* name, const std::vector<int64_t>& widths) {
        if (tensors.size() != 2 * (widths.size() - 1)) throw py::value_error(std::string(name) + ": wrong length");
        for (size_t i = 0; i < tensors.size(); ++i) {
            const int64_t in = widths[i / 2], out = widths[i / 2 + 1];
            views_.emplace_back(tensors[i], name, i % 2 == 0 ? 2 : 1);
            if (views_.back().size(0) != out || (i % 2 == 0 && views_.back().size(1) != in))
                throw py::value_error(std::string(name) + "[" + std::to_string(i) + "] has the wrong shape");
        }
    }
    template <typename T>
    std::vector<T> pointers() const {
        std::vector<T> result;
        for (const auto& view : views_) result.push_back(view.data());
        return result;
    }

  private:
    std::vector<sdw::TensorView<float>> views_;
};

// [D, hidden widths, A] as the inputs' columns and the weights' rows say.
std::vector<int64_t> widths_of(int64_t inputs, const py::sequence& params) {
    std::vector<int64_t> widths{inputs};
    for (size_t i = 0; i + 1 < params.size(); i += 2)
        widths.push_back(sdw::TensorView<float>(params[i], "params", 2).size(0));
    if (widths.size() < 2) throw py::value_error("params must hold at least one layer");
    return widths;
}

void require(bool condition, const char* message) {
    if (!condition) throw py::value_error(message);
}

// The tape as Python holds it, with the shapes that its gradients must have.
struct PyUnrolledBCTape {
    std::unique_ptr<sdw::UnrolledBCTape> tape;
    std::vector<int64_t> widths;
    int64_t rows;
};

void bind_unrolled_bc(py::module_& m) {
    py::class_<PyUnrolledBCTape>(m, "UnrolledBCTape")
        .def(
            "backward",
            [](PyUnrolledBCTape& self, const py::sequence& grad_trained, const py::object& grad_observations,
               const py::object& grad_actions, const py::object& grad_params) {
                const ParamViews incoming(grad_trained, "grad_trained", self.widths);
                sdw::UnrolledBCGradients g{incoming.pointers<const float*>(), nullptr, nullptr, {}, 0.0};
                std::vector<sdw::TensorView<float>> outputs;
                const auto output = [&](const py::object& tensor, const char* name, int64_t columns) -> float* {
                    if (tensor.is_none()) return nullptr;
                    const auto& view = outputs.emplace_back(tensor, name, 2);
                    require(view.size(0) == self.rows && view.size(1) == columns,
                            "gradients must have the data's shape");
                    return view.data();
                };
                g.observations = output(grad_observations, "grad_observations", self.widths.front());
                g.actions = output(grad_actions, "grad_actions", self.widths.back());
                std::unique_ptr<ParamViews> outgoing;
                if (!grad_params.is_none()) {
                    outgoing = std::make_unique<ParamViews>(grad_params, "grad_params", self.widths);
                    g.params = outgoing->pointers<float*>();
                }
                const py::gil_scoped_release release;
                self.tape->backward(g, sdw::num_threads());
                return g.lr;
            },
            py::arg("grad_trained"), py::arg("grad_observations"), py::arg("grad_actions"), py::arg("grad_params"));
    m.def(
        "unrolled_bc",
        [](const py::object& observations, const py::object& actions, const py::sequence& params,
           const py::sequence& trained, int64_t steps, int64_t window, float lr, float momentum, bool recompute,
           bool keep_tape) -> std::unique_ptr<PyUnrolledBCTape> {
            const sdw::TensorView<float> s(observations, "observations", 2), a(actions, "actions", 2);
            const std::vector<int64_t> widths = widths_of(s.size(1), params);
            const ParamViews start(params, "params", widths), end(trained, "trained", widths);
            require(s.size(0) >= 1 && a.size(0) == s.size(0), "observations and actions must have the same rows");
            require(*std::min_element(widths.begin(), widths.end()) >= 1, "layers must not be empty");
            require(a.size(1) == widths.back(), "actions must have a column an output");
            require(steps >= 1 && window >= 1 && window <= steps, "1 <= window <= steps is required");
            sdw::UnrolledBCParams p{s.size(0),
                                    widths,
                                    s.data(),
                                    a.data(),
                                    start.pointers<const float*>(),
                                    end.pointers<float*>(),
                                    lr,
                                    momentum,
                                    steps,
                                    window,
                                    keep_tape,
                                    recompute,
                                    sdw::num_threads()};
            const py::gil_scoped_release release;
            auto tape = sdw::unrolled_bc(p);
            if (tape == nullptr) return nullptr;
            return std::make_unique<PyUnrolledBCTape>(PyUnrolledBCTape{std::move(tape), widths, p.rows});
        },
        py::arg("observations"), py::arg("actions"), py::arg("params"), py::arg("trained"), py::kw_only(),
        py::arg("steps"), py::arg("window"), py::arg("lr"), py::arg("momentum"), py::arg("recompute"),
        py::arg("keep_tape"));
}

void bind_behavior_matching(py::module_& m) {
    m.def(
        "behavior_matching",
        [](const py::sequence& params, const py::object& states, const py::object& targets, const py::object& weights,
           const py::object& gradients) {
            const sdw::TensorView<float> s(states, "states", 2), y(targets, "targets", 2), w(weights, "weights", 1);
            const std::vector<int64_t> widths = widths_of(s.size(1), params);
            const ParamViews views(params, "params", widths);
            require(s.size(0) >= 1 && y.size(0) == s.size(0) && w.size(0) == s.size(0), "rows must agree");
            require(*std::min_element(widths.begin(), widths.end()) >= 1, "layers must not be empty");
            require(y.size(1) == widths.back(), "targets must have a column an output");
            std::unique_ptr<ParamViews> outgoing;
            if (!gradients.is_none()) outgoing = std::make_unique<ParamViews>(gradients, "gradients", widths);
            const sdw::BehaviorMatchingParams p{s.size(0),
                                                widths,
                                                views.pointers<const float*>(),
                                                s.data(),
                                                y.data(),
                                                w.data(),
                                                outgoing ? outgoing->pointers<float*>() : std::vector<float*>{},
                                                sdw::num_threads()};
            const py::gil_scoped_release release;
            return sdw::behavior_matching(p);
        },
        py::arg("params"), py::arg("states"), py::arg("targets"), py::arg("weights"), py::arg("gradients"));
}

void bind_weighted_bc_loss(py::module_& m) {
    m.def(
        "weighted_bc_loss",
        [](const py::object& pred, const py::object& target, const py::object& weights, const py::object& gradient) {
            const sdw::TensorView<float> x(pred, "pred", 2), y(target, "target", 2), w(weights, "weights", 1);
            require(x.size(0) >= 1 && x.size(1) >= 1, "pred must not be empty");
            require(y.size(0) == x.size(0) && y.size(1) == x.size(1) && w.size(0) == x.size(0), "shapes must agree");
            std::unique_ptr<sdw::TensorView<float>> g;
            if (!gradient.is_none()) {
                g = std::make_unique<sdw::TensorView<float>>(gradient, "gradient", 2);
                require(g->size(0) == x.size(0) && g->size(1) == x.size(1), "gradient must have the shape of pred");
            }
            const sdw::WeightedBCLossParams p{
                x.size(0), x.size(1), x.data(), y.data(), w.data(), g ? g->data() : nullptr, sdw::num_threads()};
            const py::gil_scoped_release release;
            return sdw::weighted_bc_loss(p);
        },
        py::arg("pred"), py::arg("target"), py::arg("weights"), py::arg("gradient"));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of sdw_fast; use sdw_fast.ops.";
    bind_runtime(m);
    bind_behavior_matching(m);
    bind_unrolled_bc(m);
    bind_weighted_bc_loss(m);
    sdw::bind_knn(m);
#ifdef SDW_WITH_CUDA
    sdw::bind_cuda(m);
#endif
}
