// The door between Python and the CUDA ops: as csrc/bindings.cpp, with tensors on the device, a workspace that the
// caller allocates and the stream as an integer. One bind_<op> function an op.
#include "bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>

#include "../dlpack.h"
#include "sdw/behavior_matching.h"
#include "sdw/knn_cuda.h"
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

// Points as given, float or double.
class PointsView {
  public:
    PointsView(const py::object& points, const char* name)
        : is_double(py::str(points.attr("dtype")).cast<std::string>().find("64") != std::string::npos) {
        if (is_double)
            double_ = std::make_unique<TensorView<double>>(points, name, 2, kDevice);
        else
            float_ = std::make_unique<TensorView<float>>(points, name, 2, kDevice);
    }
    const void* data() const { return is_double ? static_cast<const void*>(double_->data()) : float_->data(); }
    int64_t size(int axis) const { return is_double ? double_->size(axis) : float_->size(axis); }

    const bool is_double;

  private:
    std::unique_ptr<TensorView<float>> float_;
    std::unique_ptr<TensorView<double>> double_;
};

void bind_knn(py::module_& m) {
    m.attr("knn_cuda_max_dims") = kKnnCudaMaxDims;
    m.attr("knn_cuda_max_k") = kKnnCudaMaxK;
    m.attr("knn_cuda_leaf") = kKnnLeaf;
    m.attr("knn_cuda_fan") = kKnnFan;
    m.attr("knn_cuda_far") = kKnnFar;
    m.def("knn_cuda_width", &knn_cuda_width, py::arg("dims"));
    m.def("knn_cuda_workspace", &knn_cuda_workspace, py::arg("rows"), py::arg("k"));
    m.def(
        "knn_cuda",
        [](const py::object& points_, const py::object& coordinates_, const py::object& row_,
           const py::object& first_row_, const py::object& leaf_boxes_, const py::object& cell_boxes_,
           const py::object& query_points_, const py::object& query_coordinates_, const py::object& query_row_,
           int64_t first, int64_t k, int64_t self_offset, bool prune, const py::object& workspace_,
           const py::object& counts_, const py::object& squared_, const py::object& index_, uintptr_t stream) {
            const PointsView points(points_, "points"), query_points(query_points_, "query_points");
            const TensorView<float> coordinates(coordinates_, "coordinates", 4, kDevice),
                leaf_boxes(leaf_boxes_, "leaf_boxes", 5, kDevice), cell_boxes(cell_boxes_, "cell_boxes", 5, kDevice),
                query_coordinates(query_coordinates_, "query_coordinates", 2, kDevice);
            const TensorView<int64_t> row(row_, "row", 1, kDevice), first_row(first_row_, "first_row", 1, kDevice),
                query_row(query_row_, "query_row", 1, kDevice), index(index_, "index", 2, kDevice);
            const TensorView<int32_t> counts(counts_, "counts", 2, kDevice);
            const TensorView<double> squared(squared_, "squared", 2, kDevice);
            const TensorView<uint8_t> workspace(workspace_, "workspace", 1, kDevice);
            const int64_t dims = points.size(1), width = knn_cuda_width(dims), leaves = coordinates.size(0),
                          cells = (leaves + kKnnFan - 1) / kKnnFan, packs = (cells + kKnnFan - 1) / kKnnFan,
                          rows = index.size(0);
            require(dims >= 1 && width > 0, "points must have 1 to knn_cuda_max_dims columns");
            require(leaves >= 1 && leaves < int64_t{1} << 26 && coordinates.size(1) * 4 == width &&
                        coordinates.size(2) == kKnnLeaf && coordinates.size(3) == 4,
                    "coordinates must have shape (leaves, width / 4, 64, 4) with fewer than 2^26 leaves");
            require(row.size(0) == leaves * kKnnLeaf && first_row.size(0) == cells * kKnnFan,
                    "row and first_row must have a number for each place and leaf");
            for (const auto* boxes : {&leaf_boxes, &cell_boxes})
                require(boxes->size(0) == (boxes == &leaf_boxes ? cells : packs) && boxes->size(1) == 2 &&
                            boxes->size(2) * 4 == width && boxes->size(3) == kKnnFan && boxes->size(4) == 4,
                        "boxes must have shape (packs, 2, width / 4, 32, 4)");
            require(query_points.is_double == points.is_double && query_points.size(1) == dims,
                    "queries and references must agree in dimensions and dtype");
            require(query_coordinates.size(1) == width && query_coordinates.size(0) == query_row.size(0),
                    "query_coordinates must have shape (queries, width), one row for each query_row");
            require(first >= 0 && first % kKnnFan == 0 && rows >= 1 && first + rows <= query_row.size(0),
                    "no such queries");
            require(k >= 1 && k <= kKnnCudaMaxK && k <= points.size(0), "k must be in [1, 256] and the references");
            require(index.size(1) == k && squared.size(0) == rows && squared.size(1) == k,
                    "outputs must have shape (rows, k)");
            require(counts.size(0) == (rows + kKnnFan - 1) / kKnnFan && counts.size(1) == 3,
                    "counts must have shape (groups, 3)");
            const KnnCudaParams p{points.data(),
                                  points.is_double,
                                  coordinates.data(),
                                  row.data(),
                                  first_row.data(),
                                  leaf_boxes.data(),
                                  cell_boxes.data(),
                                  leaves,
                                  query_points.data(),
                                  query_coordinates.data(),
                                  query_row.data(),
                                  first,
                                  rows,
                                  dims,
                                  k,
                                  self_offset,
                                  prune,
                                  workspace_of(workspace, knn_cuda_workspace(rows, k)),
                                  counts.data(),
                                  squared.data(),
                                  index.data()};
            const py::gil_scoped_release release;
            knn_cuda(p, as_stream(stream));
        },
        py::arg("points"), py::arg("coordinates"), py::arg("row"), py::arg("first_row"), py::arg("leaf_boxes"),
        py::arg("cell_boxes"), py::arg("query_points"), py::arg("query_coordinates"), py::arg("query_row"),
        py::kw_only(), py::arg("first"), py::arg("k"), py::arg("self_offset"), py::arg("prune"), py::arg("workspace"),
        py::arg("counts"), py::arg("squared"), py::arg("index"), py::arg("stream"));
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
    bind_knn(m);
    bind_scale(m);
    bind_unrolled_bc(m);
    bind_weighted_bc_loss(m);
}

}  // namespace sdw
