// Exact k nearest neighbors on a CUDA device. The caller has put references and queries in the order of a kd-tree over
// their coordinates (those of knn.h) and packed them; sdw_fast/ops/knn_cuda.py does so.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sdw {

constexpr int kKnnLeaf = 64;             // points of a leaf
constexpr int kKnnFan = 32;              // boxes of a pack: leaves of a cell; and queries of a group
constexpr float kKnnFar = 1e30f;         // coordinate of what fills up the last leaf and pack
constexpr int64_t kKnnCudaMaxDims = 64;  // largest dimension that is compiled
constexpr int64_t kKnnCudaMaxK = 256;

// Coordinates a point has in the kernels: dims rounded up with zeros to the next width W that is compiled, a multiple
// of 4; 0 where dims is above kKnnCudaMaxDims. V = W / 4 below.
int64_t knn_cuda_width(int64_t dims);

// All pointers are to device memory.
struct KnnCudaParams {
    // The references: (rows, dims) points as given, row-major, float or double, which define the distances; and their
    // tree. Places are numbered along the tree, 64 a leaf, 32 leaves a cell, 32 cells a pack.
    const void* points;
    bool is_double;            // whether points and query_points are
    const float* coordinates;  // [leaves][V][64][4]; kKnnFar in the first coordinates of places without a point
    const int64_t* row;        // [leaves * 64] row of the point at a place, -1 for none
    const int64_t* first_row;  // [cells * 32] lowest row of each leaf
    const float* leaf_boxes;   // [cells][2][V][32][4] low and high ends; empty ones are at kKnnFar
    const float* cell_boxes;   // [packs][2][V][32][4]
    int64_t leaves;            // below 2^26

    // The queries, of which this call answers `rows` from `first` (a multiple of 32) on.
    const void* query_points;        // (all queries, dims)
    const float* query_coordinates;  // (all queries, W) in tree order
    const int64_t* query_row;        // (all queries,) row of query_points of each
    int64_t first;
    int64_t rows;

    int64_t dims;         // 1 to kKnnCudaMaxDims
    int64_t k;            // 1 to kKnnCudaMaxK, at most the references (but for a row left out)
    int64_t self_offset;  // query row i leaves out reference row i + self_offset, if there is one
    bool prune;           // false: look at everything, to compare with

    void* workspace;  // knn_cuda_workspace(rows, k) bytes, aligned to 8
    int32_t* counts;  // (groups of this call, 3) of each 32 queries: leaves whose box was tested against each of them,
                      // pairs (query, leaf) scanned, queries that had to be searched again in double
    double* squared;  // (rows, k) squared distances, ascending; equal ones by row
    int64_t* index;   // (rows, k) rows of the references
};

size_t knn_cuda_workspace(int64_t rows, int64_t k);

// Enqueues the search on `stream` (a cudaStream_t) of the current device. Waits for nothing, allocates nothing.
void knn_cuda(const KnnCudaParams& params, void* stream);

}  // namespace sdw
