// Queries that are searched together: their coordinates, thresholds, and sorted lists of candidates.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "block.h"
#include "sdw/knn_bounds.h"
#include "tree.h"

namespace sdw::SDW_ISA {
namespace {

// A candidate as one number: float bits of the squared distance, place. Ordered like the distances, as these are not
// negative.
inline int64_t make_key(float squared, uint32_t place) {
    uint32_t bits;
    std::memcpy(&bits, &squared, 4);
    return static_cast<int64_t>(bits) << 32 | place;
}
inline float key_distance(int64_t key) {
    const auto bits = static_cast<uint32_t>(key >> 32);
    float squared;
    std::memcpy(&squared, &bits, 4);
    return squared;
}
inline uint32_t key_place(int64_t key) { return static_cast<uint32_t>(key); }

// Up to 16 queries for a walk through the tree, up to 64 for a scan of everything, as there is room for. A thread loads
// group after group into it.
struct Group {
    Group(const Tree& tree_, const KnnParams& asked, int room)
        : tree(tree_),
          queries(asked.queries),
          dims(queries.dims),
          k(asked.k),
          self_offset(asked.self_offset),
          reach(asked.reach),
          capacity((k + 5 + k / 8 + 7) / 8 * 8),
          stride(capacity + 8),
          rows(allocate<float>(room * dims)),
          lanes(allocate<float>(kFan * dims)),
          low(allocate<float>(dims)),
          high(allocate<float>(dims)),
          lists(allocate<int64_t>(room * stride)) {}

    // Takes up these `count_` rows of the queries.
    void take(const uint32_t* rows_, int count_, const KnnBounds& bounds_);

    int64_t* list(int q) const { return lists.get() + q * stride + 8; }

    // Adds a candidate to the list of a query, whose threshold follows.
    inline void insert(int q, float squared, uint32_t place);

    // The bound on a float squared distance that follows from the k-th one, or from the reach.
    void set_threshold(int q, float squared) {
        threshold[q] = bounds.widen * squared + slack[q];
        product_threshold[q] = (threshold[q] - norm[q]) / 2;
    }

    // Squared distance in double beyond which no neighbor of a query counts.
    double reach_of(int q) const { return reach ? reach[query_row[q]] : std::numeric_limits<double>::infinity(); }

    // Gives up on queries whose neighbors are closer than float resolves, as their thresholds mean nothing.
    void mark_unresolved();

    float largest_threshold() const;

    const Tree& tree;
    const KnnPoints queries;
    const int64_t dims, k, self_offset;
    const double* reach;     // of every query, or none
    const int64_t capacity;  // of a list; a multiple of 8, with room beyond k
    const int64_t stride;    // capacity and 8 in front, the last of which is a sentinel
    KnnBounds bounds{};
    int count = 0;
    int64_t work = 0;  // operations on vectors of 16, about

    uint32_t query_row[kBatch];
    uint32_t self[kBatch];                        // row of the references that a query leaves out, or kNoRow
    Aligned<float> rows;                          // [room][dims]
    Aligned<float> lanes;                         // [dims][16]
    Aligned<float> low, high;                     // [dims] the group's box
    alignas(64) float threshold[kBatch];          // T of each query; -1: wants none
    alignas(64) float product_threshold[kBatch];  // the same for ‖x‖²/2 − qx
    float slack[kBatch];
    float norm[kBatch];
    bool exact[kBatch];       // must be searched by double distances
    Aligned<int64_t> lists;   // [room][stride] ascending keys
    int64_t dropped[kBatch];  // least key that fell off a list
};

void Group::take(const uint32_t* rows_, int count_, const KnnBounds& bounds_) {
    count = count_;
    bounds = bounds_;
    std::fill_n(low.get(), dims, kFar);
    std::fill_n(high.get(), dims, -kFar);
    // Places beyond the last query repeat it and want nothing.
    for (int q = 0; q < (count <= kFan ? kFan : kBatch); ++q) {
        const int64_t query = rows_[std::min(q, count - 1)];
        const float* x = queries.coordinates + query * dims;
        double sum = 0;
        for (int64_t d = 0; d < dims; ++d) {
            rows[q * dims + d] = x[d];
            if (q < kFan) lanes[d * kFan + q] = x[d];
            low[d] = std::min(low[d], x[d]);
            high[d] = std::max(high[d], x[d]);
            sum += static_cast<double>(x[d]) * x[d];
        }
        query_row[q] = static_cast<uint32_t>(query);
        const int64_t left_out = query + self_offset;
        self[q] = left_out >= 0 && left_out < tree.references.rows ? static_cast<uint32_t>(left_out) : kNoRow;
        norm[q] = static_cast<float>(sum);
        slack[q] = bounds.slack * norm[q] + bounds.floor;
        threshold[q] = q < count ? kNone : -1;
        product_threshold[q] = q < count ? kNone : -kNone;
        exact[q] = false;
        // A reach in the units of the coordinates, where they can hold it, bounds the list from the start.
        const double within = reach_of(q) * tree.scale * tree.scale * (1 + 1e-6);
        if (q < count && within < kNone / 4) set_threshold(q, static_cast<float>(within));
        std::fill(list(q) - 8, list(q), std::numeric_limits<int64_t>::min());
        std::fill(list(q), list(q) + capacity, make_key(kNone, kNoRow));
        dropped[q] = std::numeric_limits<int64_t>::max();
    }
}

// Branch-free: list'[i] = min(list[i], max(list[i - 1], key)).
inline void Group::insert(int q, float squared, uint32_t place) {
    if (tree.row[place] == self[q]) return;
    const int64_t key = make_key(squared, place);
    int64_t* keys = list(q);
    dropped[q] = std::min(dropped[q], std::max(keys[capacity - 1], key));
    for (int64_t at = capacity - 8; at >= 0; at -= 8) {
        int64_t shifted[8];
        for (int i = 0; i < 8; ++i) shifted[i] = std::max(keys[at + i - 1], key);
        for (int i = 0; i < 8; ++i) keys[at + i] = std::min(keys[at + i], shifted[i]);
    }
    const float kth = key_distance(keys[k - 1]);
    if (kth < kNone) set_threshold(q, kth);
}

void Group::mark_unresolved() {
    for (int q = 0; q < count; ++q) {
        const float kth = key_distance(list(q)[k - 1]);
        if (kth < kNone && threshold[q] > 4 * kth) {
            exact[q] = true;
            threshold[q] = -1;
        }
    }
}

float Group::largest_threshold() const {
    Vec largest = load(threshold);
    for (int v = 1; v < kVectors; ++v) largest = larger(largest, load(threshold + v * kLanes));
    float result = -1;
    for (int i = 0; i < kLanes; ++i) result = std::max(result, largest[i]);
    return result;
}

}  // namespace
}  // namespace sdw::SDW_ISA
