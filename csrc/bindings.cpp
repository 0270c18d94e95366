// The door between Python and the kernels: takes tensors by DLPack, checks them, releases the GIL, calls the op.
// No arithmetic here. One bind_<op> function an op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>

#include "dlpack.h"
#include "sdw/behavior_matching.h"
#include "sdw/isa.h"
#include "sdw/knn.h"
#include "sdw/unrolled_bc.h"
#include "sdw/weighted_bc_loss.h"
#ifdef SDW_WITH_CUDA
#include "cuda/bindings.h"
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

// The points and their pruning coordinates, borrowed for as long as this lives.
struct BorrowedPoints {
    sdw::TensorView<float> coordinates;
    std::unique_ptr<sdw::TensorView<float>> single;
    std::unique_ptr<sdw::TensorView<double>> twice;
    sdw::KnnPoints points;

    BorrowedPoints(const py::object& points_, const py::object& coordinates_)
        : coordinates(coordinates_, "coordinates", 2) {
        const bool is_double = py::str(points_.attr("dtype")).cast<std::string>().find("64") != std::string::npos;
        if (is_double)
            twice = std::make_unique<sdw::TensorView<double>>(points_, "points", 2);
        else
            single = std::make_unique<sdw::TensorView<float>>(points_, "points", 2);
        const int64_t rows = is_double ? twice->size(0) : single->size(0);
        const int64_t dims = is_double ? twice->size(1) : single->size(1);
        require(coordinates.size(0) == rows && coordinates.size(1) == dims,
                "points and coordinates must have the same shape");
        require(rows >= 1 && dims >= 1 && rows < (int64_t{1} << 32) - 64,
                "points must have 1 to 2^32 - 65 rows and at least 1 dimension");
        const void* data = is_double ? static_cast<const void*>(twice->data()) : single->data();
        points = {data, is_double, coordinates.data(), rows, dims};
    }
};

struct PyKnnIndex {
    std::unique_ptr<BorrowedPoints> references;
    std::unique_ptr<sdw::KnnIndex> index;
};

struct PyKnnJoin {
    std::unique_ptr<BorrowedPoints> queries;  // none in a self-join
    std::unique_ptr<sdw::KnnJoin> join;
    int64_t k;
};

void bind_knn(py::module_& m) {
    py::class_<PyKnnIndex>(m, "KnnIndex")
        .def(py::init([](const py::object& points, const py::object& coordinates, double scale) {
                 auto self = std::make_unique<PyKnnIndex>();
                 self->references = std::make_unique<BorrowedPoints>(points, coordinates);
                 py::gil_scoped_release release;
                 self->index = sdw::build_knn_index(self->references->points, scale);
                 return self;
             }),
             py::arg("points"), py::arg("coordinates"), py::arg("scale"))
        .def(
            "self_join",
            [](const PyKnnIndex& self, int64_t k) {
                require(k >= 1 && k < self.references->points.rows, "k must be in [1, rows - 1]");
                PyKnnJoin join{nullptr, nullptr, k};
                py::gil_scoped_release release;
                join.join = self.index->join(self.references->points, k, 0);
                return join;
            },
            py::arg("k"), py::keep_alive<0, 1>())
        .def(
            "join",
            [](const PyKnnIndex& self, const py::object& points, const py::object& coordinates, int64_t k,
               int64_t self_offset) {
                PyKnnJoin join{std::make_unique<BorrowedPoints>(points, coordinates), nullptr, k};
                const sdw::KnnPoints &queries = join.queries->points, &references = self.references->points;
                require(queries.dims == references.dims && queries.is_double == references.is_double,
                        "queries and references must agree in dimensions and dtype");
                require(k >= 1 && k <= references.rows, "k must be in [1, rows of the references]");
                py::gil_scoped_release release;
                join.join = self.index->join(queries, k, self_offset);
                return join;
            },
            py::arg("points"), py::arg("coordinates"), py::arg("k"), py::arg("self_offset"), py::keep_alive<0, 1>());
    py::class_<PyKnnJoin>(m, "KnnJoin")
        .def_property_readonly("groups", [](const PyKnnJoin& self) { return self.join->groups(); })
        .def_property_readonly("scans", [](const PyKnnJoin& self) { return self.join->scans(); })
        .def("rows", [](const PyKnnJoin& self, int64_t first, int64_t last) { return self.join->rows(first, last); })
        .def(
            "search",
            [](const PyKnnJoin& self, int64_t first, int64_t last, const py::object& query_, const py::object& squared_,
               const py::object& index_) {
                sdw::TensorView<int64_t> query(query_, "query", 1), index(index_, "index", 2);
                sdw::TensorView<double> squared(squared_, "squared", 2);
                if (first < 0 || last < first || last > self.join->groups()) throw py::index_error("no such groups");
                const int64_t rows = self.join->rows(first, last);
                require(query.size(0) == rows && squared.size(0) == rows && squared.size(1) == self.k &&
                            index.size(0) == rows && index.size(1) == self.k,
                        "outputs must have shapes (rows,), (rows, k) and (rows, k)");
                py::gil_scoped_release release;
                self.join->search(first, last, query.data(), squared.data(), index.data());
            },
            py::arg("first"), py::arg("last"), py::arg("query"), py::arg("squared"), py::arg("index"));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of sdw_fast; use sdw_fast.ops.";
    bind_runtime(m);
    bind_behavior_matching(m);
    bind_unrolled_bc(m);
    bind_weighted_bc_loss(m);
    bind_knn(m);
#ifdef SDW_WITH_CUDA
    sdw::bind_cuda(m);
#endif
}
