// Exact k nearest neighbors: an index over references, and joins of queries with it.
#pragma once

#include <cstdint>
#include <memory>

namespace sdw {

// Points twice: as given, which defines the distances, and as coordinates fit for pruning. Both stay the caller's and
// must outlive what is built on them.
struct KnnPoints {
    const void* points;        // (rows, dims) row-major, float or double: distances are computed from these, in double
    bool is_double;            // which of the two
    const float* coordinates;  // (rows, dims) row-major: scale * (points - center) * axes, with orthonormal axes, the
                               // widest first, rounded to float from double; scale * distance < 2^62
    int64_t rows;              // below 2^32
    int64_t dims;              // from 1
};

// Queries joined with an index: grouped by place, so that a group shares one walk through the tree.
class KnnJoin {
  public:
    virtual ~KnnJoin() = default;

    virtual int64_t groups() const = 0;

    // Rows in groups [first, last).
    virtual int64_t rows(int64_t first, int64_t last) const = 0;

    // Whether sampled groups had to look at so much that the join scans all references instead of walking the tree.
    virtual bool scans() const = 0;

    // Finds the neighbors of the queries in groups [first, last), in the threads of sdw::num_threads().
    //   query      (rows,)   which query each row of the output belongs to
    //   squared    (rows, k) squared distances, ascending, in double; equal ones by index
    //   index      (rows, k) rows of the references
    virtual void search(int64_t first, int64_t last, int64_t* query, double* squared, int64_t* index) const = 0;
};

// A tree over references. Immutable once built; a join refers to it.
class KnnIndex {
  public:
    virtual ~KnnIndex() = default;

    // The k nearest references of every query. Query i leaves out reference i + self_offset, if there is one:
    // 0 for a self-join, -dims.rows or less for none. queries.coordinates share center, axes and scale with the index.
    virtual std::unique_ptr<KnnJoin> join(const KnnPoints& queries, int64_t k, int64_t self_offset) const = 0;
};

// Builds the index with the kernels of the active instruction set. `scale` is that of the coordinates, a power of two.
// Throws OutOfMemory where the memory for it is not there.
std::unique_ptr<KnnIndex> build_knn_index(const KnnPoints& references, double scale);

}  // namespace sdw
