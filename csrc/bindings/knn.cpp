// Exact neighbors as Python sees them.
#include "sdw/knn.h"

#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "views.h"
#ifdef SDW_WITH_CUDA
#include "sdw/knn_cuda.h"
#endif

namespace py = pybind11;

namespace sdw {

#ifndef SDW_EMULATE_CUDA
namespace {

// The points and their pruning coordinates, borrowed for as long as this lives.
struct BorrowedPoints {
    RealView given;
    TensorView<float> coordinates;
    KnnPoints points;

    BorrowedPoints(const py::object& points_, const py::object& coordinates_)
        : given(points_, "points", 2), coordinates(coordinates_, "coordinates", 2) {
        const int64_t rows = given.size(0), dims = given.size(1);
        require(coordinates.size(0) == rows && coordinates.size(1) == dims,
                "points and coordinates must have the same shape");
        require(rows >= 1 && dims >= 1 && rows < (int64_t{1} << 32) - 64,
                "points must have 1 to 2^32 - 65 rows and at least 1 dimension");
        points = {given.data(), given.is_double(), coordinates.data(), rows, dims};
    }
};

struct PyKnnIndex {
    std::unique_ptr<BorrowedPoints> references;
    std::unique_ptr<KnnIndex> index;
};

struct PyKnnJoin {
    std::unique_ptr<BorrowedPoints> queries;  // none in a self-join
    std::unique_ptr<KnnJoin> join;
    int64_t k;
};

}  // namespace
#endif

void bind_knn(py::module_& m) {
#ifndef SDW_EMULATE_CUDA
    py::class_<PyKnnIndex>(m, "KnnIndex")
        .def(py::init([](const py::object& points, const py::object& coordinates, double scale) {
                 auto self = std::make_unique<PyKnnIndex>();
                 self->references = std::make_unique<BorrowedPoints>(points, coordinates);
                 py::gil_scoped_release release;
                 self->index = build_knn_index(self->references->points, scale);
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
                const KnnPoints &queries = join.queries->points, &references = self.references->points;
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
                TensorView<int64_t> query(query_, "query", 1), index(index_, "index", 2);
                TensorView<double> squared(squared_, "squared", 2);
                if (first < 0 || last < first || last > self.join->groups()) throw py::index_error("no such groups");
                const int64_t rows = self.join->rows(first, last);
                require(query.size(0) == rows && squared.size(0) == rows && squared.size(1) == self.k &&
                            index.size(0) == rows && index.size(1) == self.k,
                        "outputs must have shapes (rows,), (rows, k) and (rows, k)");
                py::gil_scoped_release release;
                self.join->search(first, last, query.data(), squared.data(), index.data());
            },
            py::arg("first"), py::arg("last"), py::arg("query"), py::arg("squared"), py::arg("index"));
#endif
#ifdef SDW_WITH_CUDA
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
            const RealView points(points_, "points", 2, kDevice),
                query_points(query_points_, "query_points", 2, kDevice);
            const TensorView<float> coordinates(coordinates_, "coordinates", 4, kDevice),
                leaf_boxes(leaf_boxes_, "leaf_boxes", 5, kDevice), cell_boxes(cell_boxes_, "cell_boxes", 5, kDevice),
                query_coordinates(query_coordinates_, "query_coordinates", 2, kDevice);
            const TensorView<int64_t> row(row_, "row", 1, kDevice), first_row(first_row_, "first_row", 1, kDevice),
                query_row(query_row_, "query_row", 1, kDevice), index(index_, "index", 2, kDevice);
            const TensorView<int32_t> counts(counts_, "counts", 2, kDevice);
            const TensorView<double> squared(squared_, "squared", 2, kDevice);
            const Workspace workspace(workspace_, knn_cuda_workspace(index.size(0), index.size(1)));
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
            require(query_points.is_double() == points.is_double() && query_points.size(1) == dims,
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
                                  points.is_double(),
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
#endif
}

}  // namespace sdw
