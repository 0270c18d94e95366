// Exact k nearest neighbors, on the CPU as an index over references and joins of queries with it, on a CUDA device as
// one call on what PyTorch has packed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace sdw {

// Points twice: as given, which defines the distances, and as coordinates fit for pruning. Both stay the caller's and
// must outlive what is built on them.
struct KnnPoints {
    const void* points = nullptr;        // (rows, dims) row-major, float or double: distances are computed from these,
                                         // in double
    bool is_double = false;              // which of the two
    const float* coordinates = nullptr;  // (rows, dims) row-major: scale * (points - center) * axes, with orthonormal
                                         // axes, the widest first, rounded to float from double;
                                         // scale * distance < 2^62. On CUDA packed, see below.
    int64_t rows = 0;                    // 1 to 2^32 - 65
    int64_t dims = 0;                    // from 1; on CUDA up to kKnnCudaMaxDims
};

constexpr int64_t kKnnNoSelf = -(int64_t{1} << 62);  // an offset that meets no row

constexpr int kKnnLeaf = 64;             // CUDA: points of a leaf
constexpr int kKnnFan = 32;              // CUDA: boxes of a pack, leaves of a cell; and queries of a group
constexpr float kKnnFar = 1e30f;         // CUDA: coordinate of what fills up the last leaf and pack
constexpr float kKnnHalf = 0x1p-44f;     // CUDA: of coordinates in half precision
constexpr int64_t kKnnCudaMaxDims = 64;  // largest dimension that is compiled
constexpr int64_t kKnnCudaMaxK = 256;

// One search, for both devices. Pointers are to memory of the device.
struct KnnParams {
    // What is asked. References and queries agree in dims, is_double, and in center, axes and scale of the coordinates.
    KnnPoints references;
    KnnPoints queries;
    int64_t k = 1;                     // neighbors a query: 1 to the references (but for a row left out)
    int64_t self_offset = kKnnNoSelf;  // query row i leaves out reference row i + self_offset, if there is one;
                                       // 0: a self-join

    // The answer for the rows of one call.
    double* squared = nullptr;  // (rows, k) squared distances in double, ascending; equal ones by index
    int64_t* index = nullptr;   // (rows, k) rows of the references

    // CPU.
    double scale = 1;  // of the coordinates, a power of two
    const double* reach =
        nullptr;               // (queries.rows,) squared distance of each query beyond which no neighbor counts; the
                               // answer ends with infinities and rows -1 where fewer than k lie within; none: all
    int64_t* query = nullptr;  // (rows,) which query each row of the answer belongs to

    // CUDA. References and queries lie in the order of a kd-tree over their coordinates, each widened with zeros to
    // W = knn_cuda_width(dims) = 4V numbers. Places of references are numbered along the tree, 64 a leaf, 32 leaves a
    // cell, 32 cells a pack: references.coordinates are [leaves][V][64][4], with kKnnFar in the first coordinates of
    // places without a point; queries.coordinates are (queries.rows, W). sdw_fast/ops/_knn_cuda.py makes all of it.
    // The center is such that coordinates are shorter than 2^50, as vectors.
    int64_t leaves = 0;               // 1 to 2^26 - 1
    const int32_t* halves = nullptr;  // [leaves][4][S][32][4] pairs of float16, the first in the low bits, for the
                                      // tensor core: of 16 points, 16 at a time of the F = knn_cuda_filter_width(dims)
                                      // = 16S numbers that each has: kKnnHalf times the first F - 1 coordinates, as
                                      // far as there are any, and last the squared norm of these as they are rounded.
                                      // Lane l has numbers 4 (l % 4) to 4 (l % 4) + 3 of point l / 4 and of l / 4 + 8
    const int64_t* row = nullptr;     // [leaves * 64] row of the reference at a place, -1 for none
    const int64_t* first_row = nullptr;  // [cells * 32] lowest row of each leaf
    const float* leaf_boxes = nullptr;   // [cells][2][V][32][4] low and high ends; empty ones are at kKnnFar
    const float* cell_boxes = nullptr;   // [packs][2][V][32][4]
    const int64_t* query_row = nullptr;  // (queries.rows,) row of the queries' points at a place
    int64_t first = 0;                   // the call answers `rows` places of the queries from here on, a multiple of 32
    int64_t rows = 0;
    bool prune = true;          // false: look at everything, to compare with
    void* workspace = nullptr;  // knn_cuda_workspace(rows, k) bytes, aligned to 8
    int32_t* counts = nullptr;  // (groups of this call, 3) of each 32 queries: leaves tested against each of them,
                                // pairs (query, leaf) scanned, queries searched again in double
};

// ---------------------------------------------------------------------------------------------------------------------
// CPU

// Queries joined with an index: grouped by place, so that a group shares one walk through the tree.
class KnnJoin {
  public:
    virtual ~KnnJoin() = default;

    virtual int64_t groups() const = 0;

    // Rows in groups [first, last).
    virtual int64_t rows(int64_t first, int64_t last) const = 0;

    // Whether sampled groups had to look at so much that the join scans all references instead of walking the tree.
    virtual bool scans() const = 0;

    // Finds the neighbors of the queries in groups [first, last), in the threads of sdw::num_threads(), and writes them
    // to query, squared and index of `answer`.
    virtual void search(int64_t first, int64_t last, const KnnParams& answer) const = 0;
};

// A tree over references. Immutable once built; a join refers to it.
class KnnIndex {
  public:
    virtual ~KnnIndex() = default;

    // Joins queries, k and self_offset of `params`; where the queries are the references, a self-join.
    virtual std::unique_ptr<KnnJoin> join(const KnnParams& params) const = 0;
};

// Builds the index over references and scale of `params`, with the kernels of the active instruction set. Throws
// OutOfMemory where the memory for it is not there.
std::unique_ptr<KnnIndex> build_knn_index(const KnnParams& params);

// ---------------------------------------------------------------------------------------------------------------------
// CUDA

// Coordinates a point has in the kernels: dims rounded up with zeros to the next width W that is compiled, a multiple
// of 4; 0 where dims is above kKnnCudaMaxDims.
int64_t knn_cuda_width(int64_t dims);

// Numbers of a point in half precision, a multiple of 16; 0 likewise.
int64_t knn_cuda_filter_width(int64_t dims);

size_t knn_cuda_workspace(int64_t rows, int64_t k);

// Enqueues the search on `stream` (a cudaStream_t) of the current device. Waits for nothing, allocates nothing.
void knn_cuda(const KnnParams& params, void* stream);

}  // namespace sdw
