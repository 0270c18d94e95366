// knn as Python sees it, on both devices: takes tensors by DLPack, checks them, releases the GIL, calls the op.
#include "sdw/knn.h"

#include <pybind11/pybind11.h>

#include <memory>

#include "gil.h"
#include "views.h"

namespace py = pybind11;

namespace sdw {
namespace {

KnnPoints make_points(const RealView& points, const TensorView<float>& coordinates) {
    KnnPoints p;
    p.points = points.data();
    p.is_double = points.is_double();
    p.coordinates = coordinates.data();
    p.rows = points.size(0);
    p.dims = points.size(1);
    return p;
}

#ifndef SDW_EMULATE_CUDA

// What `work` returns; the GIL is held again before anything that borrows from Python is freed.
template <typename Work>
auto without_gil(const Work& work) {
    const WithoutGil without_gil;
    return work();
}

// Points and their pruning coordinates, borrowed for as long as this lives.
class Borrowed {
  public:
    Borrowed(const py::object& points, const py::object& coordinates)
        : points_(points, "points", 2), coordinates_(coordinates, "coordinates", 2) {
        const KnnPoints p = get();
        require(coordinates_.size(0) == p.rows && coordinates_.size(1) == p.dims,
                "points and coordinates must have the same shape");
        require(p.rows >= 1 && p.dims >= 1 && p.rows < (int64_t{1} << 32) - 64,
                "points must have 1 to 2^32 - 65 rows and at least 1 dimension");
    }
    KnnPoints get() const { return make_points(points_, coordinates_); }

  private:
    RealView points_;
    TensorView<float> coordinates_;
};

struct PyKnnIndex {
    std::unique_ptr<Borrowed> references;
    std::unique_ptr<KnnIndex> index;
};

struct PyKnnJoin {
    std::unique_ptr<Borrowed> queries;          // none in a self-join
    std::unique_ptr<TensorView<double>> reach;  // or none
    std::unique_ptr<KnnJoin> join;
    int64_t k;
};

void bind_cpu(py::module_& m) {
    // Made by a function, and returned by value: pybind11 frees what a constructor made twice, or ends the process, if
    // memory runs out while it registers the object.
    m.def(
        "KnnIndex",
        [](const py::object& points, const py::object& coordinates, double scale) {
            auto references = std::make_unique<Borrowed>(points, coordinates);
            KnnParams p;
            p.references = references->get();
            p.scale = scale;
            auto index = without_gil([&] { return build_knn_index(p); });
            return PyKnnIndex{std::move(references), std::move(index)};
        },
        py::arg("points"), py::arg("coordinates"), py::arg("scale"));
    py::class_<PyKnnIndex>(m, "KnnTree")
        .def(
            "self_join",
            [](const PyKnnIndex& self, int64_t k) {
                KnnParams p;
                p.references = p.queries = self.references->get();
                p.k = k;
                p.self_offset = 0;
                require(k >= 1 && k < p.references.rows, "k must be in [1, rows - 1]");
                return PyKnnJoin{nullptr, nullptr, without_gil([&] { return self.index->join(p); }), k};
            },
            py::arg("k"), py::keep_alive<0, 1>())
        .def(
            "join",
            [](const PyKnnIndex& self, const py::object& points, const py::object& coordinates, int64_t k,
               int64_t self_offset, const py::object& reach_) {
                auto queries = std::make_unique<Borrowed>(points, coordinates);
                KnnParams p;
                p.references = self.references->get();
                p.queries = queries->get();
                p.k = k;
                p.self_offset = self_offset;
                require(p.queries.dims == p.references.dims && p.queries.is_double == p.references.is_double,
                        "queries and references must agree in dimensions and dtype");
                require(k >= 1 && k <= p.references.rows, "k must be in [1, rows of the references]");
                std::unique_ptr<TensorView<double>> reach;
                if (!reach_.is_none()) {
                    reach = std::make_unique<TensorView<double>>(reach_, "reach", 1);
                    require(reach->size(0) == p.queries.rows, "reach must have shape (rows of the queries,)");
                    p.reach = reach->data();
                }
                auto join = without_gil([&] { return self.index->join(p); });
                return PyKnnJoin{std::move(queries), std::move(reach), std::move(join), k};
            },
            py::arg("points"), py::arg("coordinates"), py::arg("k"), py::arg("self_offset"),
            py::arg("reach") = py::none(), py::keep_alive<0, 1>());
    py::class_<PyKnnJoin>(m, "KnnJoin")
        .def_property_readonly("groups", [](const PyKnnJoin& self) { return self.join->groups(); })
        .def_property_readonly("scans", [](const PyKnnJoin& self) { return self.join->scans(); })
        .def("rows", [](const PyKnnJoin& self, int64_t first, int64_t last) { return self.join->rows(first, last); })
        .def(
            "search",
            [](const PyKnnJoin& self, int64_t first, int64_t last, const py::object& query_, const py::object& squared_,
               const py::object& index_) {
                const TensorView<int64_t> query(query_, "query", 1), index(index_, "index", 2);
                const TensorView<double> squared(squared_, "squared", 2);
                if (first < 0 || last < first || last > self.join->groups()) throw py::index_error("no such groups");
                const int64_t rows = self.join->rows(first, last);
                require(query.size(0) == rows && squared.size(0) == rows && squared.size(1) == self.k &&
                            index.size(0) == rows && index.size(1) == self.k,
                        "outputs must have shapes (rows,), (rows, k) and (rows, k)");
                KnnParams answer;
                answer.query = query.data();
                answer.squared = squared.data();
                answer.index = index.data();
                const WithoutGil without_gil;
                self.join->search(first, last, answer);
            },
            py::arg("first"), py::arg("last"), py::arg("query"), py::arg("squared"), py::arg("index"));
}

#endif  // not SDW_EMULATE_CUDA

#ifdef SDW_WITH_CUDA

void search_on_cuda(const py::object& points_, const py::object& coordinates_, const py::object& halves_,
                    const py::object& row_, const py::object& first_row_, const py::object& leaf_boxes_,
                    const py::object& cell_boxes_, const py::object& query_points_,
                    const py::object& query_coordinates_, const py::object& query_row_, int64_t first, int64_t k,
                    int64_t self_offset, bool prune, const py::object& workspace_, const py::object& counts_,
                    const py::object& squared_, const py::object& index_, uintptr_t stream) {
    const RealView points(points_, "points", 2, kDevice), query_points(query_points_, "query_points", 2, kDevice);
    const TensorView<float> coordinates(coordinates_, "coordinates", 4, kDevice),
        leaf_boxes(leaf_boxes_, "leaf_boxes", 5, kDevice), cell_boxes(cell_boxes_, "cell_boxes", 5, kDevice),
        query_coordinates(query_coordinates_, "query_coordinates", 2, kDevice);
    const TensorView<int64_t> row(row_, "row", 1, kDevice), first_row(first_row_, "first_row", 1, kDevice),
        query_row(query_row_, "query_row", 1, kDevice), index(index_, "index", 2, kDevice);
    const TensorView<int32_t> halves(halves_, "halves", 5, kDevice), counts(counts_, "counts", 2, kDevice);
    const TensorView<double> squared(squared_, "squared", 2, kDevice);
    const TensorView<uint8_t> workspace(workspace_, "workspace", 1, kDevice);

    KnnParams p;
    p.references = make_points(points, coordinates);
    p.queries = make_points(query_points, query_coordinates);
    p.k = k;
    p.self_offset = self_offset;
    p.squared = squared.data();
    p.index = index.data();
    p.leaves = coordinates.size(0);
    p.halves = halves.data();
    p.row = row.data();
    p.first_row = first_row.data();
    p.leaf_boxes = leaf_boxes.data();
    p.cell_boxes = cell_boxes.data();
    p.query_row = query_row.data();
    p.first = first;
    p.rows = index.size(0);
    p.prune = prune;
    p.workspace = workspace.data();
    p.counts = counts.data();

    const int64_t width = knn_cuda_width(p.references.dims), cells = (p.leaves + kKnnFan - 1) / kKnnFan,
                  packs = (cells + kKnnFan - 1) / kKnnFan;
    require(p.references.dims >= 1 && width > 0, "points must have 1 to knn_cuda_max_dims columns");
    require(p.leaves >= 1 && p.leaves < int64_t{1} << 26 && coordinates.size(1) * 4 == width &&
                coordinates.size(2) == kKnnLeaf && coordinates.size(3) == 4,
            "coordinates must have shape (leaves, width / 4, 64, 4) with fewer than 2^26 leaves");
    require(halves.size(0) == p.leaves && halves.size(1) * 16 == kKnnLeaf &&
                halves.size(2) * 16 == knn_cuda_filter_width(p.references.dims) && halves.size(3) == kKnnFan &&
                halves.size(4) == 4,
            "halves must have shape (leaves, 4, filter width / 16, 32, 4)");
    require(row.size(0) == p.leaves * kKnnLeaf && first_row.size(0) == cells * kKnnFan,
            "row and first_row must have a number for each place and leaf");
    for (const auto* boxes : {&leaf_boxes, &cell_boxes})
        require(boxes->size(0) == (boxes == &leaf_boxes ? cells : packs) && boxes->size(1) == 2 &&
                    boxes->size(2) * 4 == width && boxes->size(3) == kKnnFan && boxes->size(4) == 4,
                "boxes must have shape (packs, 2, width / 4, 32, 4)");
    require(p.queries.is_double == p.references.is_double && p.queries.dims == p.references.dims,
            "queries and references must agree in dimensions and dtype");
    require(query_coordinates.size(1) == width && query_coordinates.size(0) == query_row.size(0),
            "query_coordinates must have shape (queries, width), one row for each query_row");
    require(first >= 0 && first % kKnnFan == 0 && p.rows >= 1 && first + p.rows <= query_row.size(0),
            "no such queries");
    require(k >= 1 && k <= kKnnCudaMaxK && k <= p.references.rows, "k must be in [1, 256] and the references");
    require(index.size(1) == k && squared.size(0) == p.rows && squared.size(1) == k,
            "outputs must have shape (rows, k)");
    require(counts.size(0) == (p.rows + kKnnFan - 1) / kKnnFan && counts.size(1) == 3,
            "counts must have shape (groups, 3)");
    require(static_cast<size_t>(workspace.size(0)) >= knn_cuda_workspace(p.rows, k), "the workspace is too small");
    const WithoutGil without_gil;
    knn_cuda(p, reinterpret_cast<void*>(stream));
}

void bind_cuda(py::module_& m) {
    m.attr("knn_cuda_max_dims") = kKnnCudaMaxDims;
    m.attr("knn_cuda_max_k") = kKnnCudaMaxK;
    m.attr("knn_cuda_leaf") = kKnnLeaf;
    m.attr("knn_cuda_fan") = kKnnFan;
    m.attr("knn_cuda_far") = kKnnFar;
    m.def("knn_cuda_width", &knn_cuda_width, py::arg("dims"));
    m.attr("knn_cuda_half") = kKnnHalf;
    m.def("knn_cuda_filter_width", &knn_cuda_filter_width, py::arg("dims"));
    m.def("knn_cuda_workspace", &knn_cuda_workspace, py::arg("rows"), py::arg("k"));
    m.def("knn_cuda", &search_on_cuda, py::arg("points"), py::arg("coordinates"), py::arg("halves"), py::arg("row"),
          py::arg("first_row"), py::arg("leaf_boxes"), py::arg("cell_boxes"), py::arg("query_points"),
          py::arg("query_coordinates"), py::arg("query_row"), py::kw_only(), py::arg("first"), py::arg("k"),
          py::arg("self_offset"), py::arg("prune"), py::arg("workspace"), py::arg("counts"), py::arg("squared"),
          py::arg("index"), py::arg("stream"));
}

#endif  // CUDA

}  // namespace

void bind_knn(py::module_& m) {
#ifndef SDW_EMULATE_CUDA
    bind_cpu(m);
#endif
#ifdef SDW_WITH_CUDA
    bind_cuda(m);
#endif
}

}  // namespace sdw
