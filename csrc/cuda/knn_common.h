// What the kernels of knn share: their parameters, keys, and distances.
#pragma once

#include <cfloat>
#include <cstdint>

#include "launch.h"
#include "sdw/knn.h"
#include "sdw/knn_bounds.h"

namespace sdw {
namespace {

constexpr int kLanes = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr float kNone = FLT_MAX;  // the limit of a query that has not found k points yet

static_assert(kKnnFan == kLanes && kKnnLeaf == 2 * kLanes, "lanes are boxes, queries, and pairs of points");

// Params as kernels take them.
struct Search {
    KnnParams p;
    KnnBounds bounds;
    int V;              // float4s a point
    int64_t packs;      // of cells
    int capacity;       // of a list
    uint64_t* lists;    // (rows, capacity) ascending keys
    float* thresholds;  // (rows,) T
};

// ---------------------------------------------------------------------------------------------------------------------
// Keys: float bits of the squared distance, place. Ordered like the distances, as these are not negative.

__device__ inline uint64_t make_key(float squared, uint32_t place) {
    return static_cast<uint64_t>(__float_as_uint(squared)) << 32 | place;
}
__device__ inline float key_distance(uint64_t key) { return __uint_as_float(static_cast<uint32_t>(key >> 32)); }
__device__ inline uint32_t key_place(uint64_t key) { return static_cast<uint32_t>(key); }

// ---------------------------------------------------------------------------------------------------------------------
// Warps

__device__ inline float warp_min(float x) {
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) x = fminf(x, __shfl_xor_sync(kAll, x, lanes));
    return x;
}
__device__ inline float warp_max(float x) { return -warp_min(-x); }

__device__ inline int lowest_lane(unsigned mask) { return __ffs(static_cast<int>(mask)) - 1; }

// ---------------------------------------------------------------------------------------------------------------------
// Distances. All sums run in the same order, and rounding is monotone: a box's distance as computed is at most that of
// any point in it as computed.

__device__ inline float add_squares(float sum, float4 x) {
    return fmaf(x.w, x.w, fmaf(x.z, x.z, fmaf(x.y, x.y, fmaf(x.x, x.x, sum))));
}
__device__ inline float4 minus(float4 a, float4 b) { return make_float4(a.x - b.x, a.y - b.y, a.z - b.z, a.w - b.w); }
__device__ inline float gap(float low, float high, float other_low, float other_high) {
    return fmaxf(fmaxf(other_low - high, low - other_high), 0.0f);
}

// Squared distance between the box [low, high] of V float4 (a point: low = high) and box `box` of a pack.
__device__ inline float box_distance(const float4* low, const float4* high, const float4* pack, int box, int V) {
    float sum = 0;
#pragma unroll 2
    for (int i = 0; i < V; ++i) {
        const float4 a = low[i], b = high[i];
        const float4 c = __ldg(pack + i * kKnnFan + box), d = __ldg(pack + (V + i) * kKnnFan + box);
        sum = add_squares(sum, make_float4(gap(a.x, b.x, c.x, d.x), gap(a.y, b.y, c.y, d.y), gap(a.z, b.z, c.z, d.z),
                                           gap(a.w, b.w, c.w, d.w)));
    }
    return sum;
}

// The pack of 32 boxes with this number.
__device__ inline const float4* pack_at(const float* boxes, int64_t pack, int V) {
    return reinterpret_cast<const float4*>(boxes) + pack * 2 * V * kKnnFan;
}

// The coordinates of a leaf: float4 i of point j at [i * 64 + j].
__device__ inline const float4* leaf_at(const float* coordinates, int64_t leaf, int V) {
    return reinterpret_cast<const float4*>(coordinates) + leaf * V * kKnnLeaf;
}

template <typename T>
__device__ inline double squared_distance(const void* a, int64_t i, const void* b, int64_t j, int64_t dims) {
    const T *x = static_cast<const T*>(a) + i * dims, *y = static_cast<const T*>(b) + j * dims;
    double sum = 0;
    for (int64_t d = 0; d < dims; ++d) {
        const double difference = static_cast<double>(x[d]) - static_cast<double>(y[d]);
        sum = fma(difference, difference, sum);
    }
    return sum;
}

// Between a row of the queries and one of the references, as given.
__device__ inline double true_distance(const KnnParams& p, int64_t query, int64_t row) {
    const void *x = p.queries.points, *y = p.references.points;
    return p.references.is_double ? squared_distance<double>(x, query, y, row, p.references.dims)
                                  : squared_distance<float>(x, query, y, row, p.references.dims);
}

}  // namespace
}  // namespace sdw
