// The door between Python and the CUDA ops: as csrc/bindings.cpp, with tensors on the device, a workspace that the
// caller allocates and the stream as an integer. One bind_<op> function an op.
#include "bindings.h"

#include <memory>
#include <string>

#include "../dlpack.h"
#include "sdw/knn_cuda.h"

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
            require(workspace.size(0) >= static_cast<int64_t>(knn_cuda_workspace(rows, k)), "workspace is too small");
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
                                  workspace.data(),
                                  counts.data(),
                                  squared.data(),
                                  index.data()};
            const py::gil_scoped_release release;
            knn_cuda(p, reinterpret_cast<void*>(stream));
        },
        py::arg("points"), py::arg("coordinates"), py::arg("row"), py::arg("first_row"), py::arg("leaf_boxes"),
        py::arg("cell_boxes"), py::arg("query_points"), py::arg("query_coordinates"), py::arg("query_row"),
        py::kw_only(), py::arg("first"), py::arg("k"), py::arg("self_offset"), py::arg("prune"), py::arg("workspace"),
        py::arg("counts"), py::arg("squared"), py::arg("index"), py::arg("stream"));
}

}  // namespace

void bind_cuda(py::module_& m) { bind_knn(m); }

}  // namespace sdw
