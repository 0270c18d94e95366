// What all of knn works on: blocks of 16 floats, and points. Included by knn.cpp alone, like its other headers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>

#include "../simd.h"
#include "sdw/knn.h"
#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

namespace sdw::SDW_ISA {
namespace {

constexpr int kFan = 16;       // points in a block, children of a node, queries in a group
constexpr int kBatch = 64;     // queries that share one pass over all references where the tree does not help
constexpr float kFar = 1e30f;  // coordinate of padding: its squared distance overflows to infinity
constexpr float kNone = std::numeric_limits<float>::max();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr uint32_t kNoRow = std::numeric_limits<uint32_t>::max();

// ---------------------------------------------------------------------------------------------------------------------
// Vectors: kVectors of them hold a block of 16 floats.

constexpr int kVectors = kFan / kLanes;

inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_maskz_max_ps(0xffff, a, b);  // the plain one warns in GCC 12
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
    return _mm_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}
inline Vec smaller(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_maskz_min_ps(0xffff, a, b);
#elif defined(__AVX2__)
    return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
    return _mm_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}
// How far x lies outside of [low, high], with a sign.
inline Vec outside(Vec x, Vec low, Vec high) { return x - smaller(larger(x, low), high); }
// Bit i says whether a[i] <= b[i].
inline uint32_t not_above(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ);
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ)));
#elif defined(__SSE2__)
    return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmple_ps(a, b)));
#else
    uint32_t mask = 0;
    for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(a[i] <= b[i]) << i;
    return mask;
#endif
}

struct Block {
    Vec part[kVectors];
};
inline uint32_t not_above(const Block& a, float b) {
    uint32_t mask = 0;
    for (int v = 0; v < kVectors; ++v) mask |= not_above(a.part[v], broadcast(b)) << (v * kLanes);
    return mask;
}
inline void store_block(float* aligned, const Block& x) {
    for (int v = 0; v < kVectors; ++v) store(aligned + v * kLanes, x.part[v]);
}

constexpr int64_t kStep = 8;  // axes after which a test asks whether all 16 are out of reach already

// Adds the squared gaps between 16 intervals (or points) and 16 others along `axes` axes, given the gap of vector v on
// axis d. Two chains of sums, because one waits for its own multiply-add most of the time.
template <typename Gap>
inline void add_gaps(Block& sum, int64_t begin, int64_t axes, const Gap& gap) {
    Block other{};
    const auto add = [&](Block& to, int64_t d) {
        for (int v = 0; v < kVectors; ++v) {
            const Vec g = gap(d, v);
            to.part[v] += g * g;
        }
    };
    if (axes == kStep) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < kStep; i += 2) add(sum, begin + i), add(other, begin + i + 1);
    } else {
        for (int64_t i = 0; i < axes; ++i) add(sum, begin + i);
    }
    for (int v = 0; v < kVectors; ++v) sum.part[v] += other.part[v];
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory aligned for vectors

struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
template <typename T>
using Aligned = std::unique_ptr<T[], Free>;
template <typename T>
Aligned<T> allocate(int64_t count) {
    return Aligned<T>(static_cast<T*>(::operator new(sizeof(T) * std::max<int64_t>(count, 1), std::align_val_t(64))));
}

// ---------------------------------------------------------------------------------------------------------------------
// Points as given

inline const void* address(const KnnPoints& a, int64_t i) {
    return static_cast<const char*>(a.points) +
           i * a.dims * static_cast<int64_t>(a.is_double ? sizeof(double) : sizeof(float));
}

double squared_distance(const KnnPoints& a, int64_t i, const KnnPoints& b, int64_t j) {
    double sum = 0;
    const auto add = [&](auto x, auto y) {
        for (int64_t d = 0; d < a.dims; ++d) {
            const double difference = static_cast<double>(x[d]) - static_cast<double>(y[d]);
            sum += difference * difference;
        }
    };
    if (a.is_double)
        add(static_cast<const double*>(address(a, i)), static_cast<const double*>(address(b, j)));
    else
        add(static_cast<const float*>(address(a, i)), static_cast<const float*>(address(b, j)));
    return sum;
}

}  // namespace
}  // namespace sdw::SDW_ISA
