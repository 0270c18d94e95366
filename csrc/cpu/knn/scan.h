// Where the tree does not help: up to 64 queries against all references by products, as a matrix multiplication with
// the threshold test in its registers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "group.h"

namespace sdw::SDW_ISA {
namespace {

// Tests all queries, Q at a time, against C blocks: s = ‖x‖²/2 − qx.
template <int Q, int C>
void scan_products(const Tree& tree, Group& group, int64_t first_block) {
    const int64_t dims = group.dims;
    const float* block = tree.coordinates.get() + first_block * dims * kFan;
    const float* half_norm = tree.half_norm.get() + first_block * kFan;
    for (int q = 0; q < group.count; q += Q) {
        const float* rows = group.rows.get() + q * dims;
        Vec sum[Q][C * kVectors];
        for (int i = 0; i < Q; ++i)
            for (int v = 0; v < C * kVectors; ++v) sum[i][v] = load(half_norm + v * kLanes);
        for (int64_t d = 0; d < dims; ++d) {
            Vec x[C * kVectors];
#pragma GCC unroll 8
            for (int v = 0; v < C * kVectors; ++v)
                x[v] = load(block + (v / kVectors * dims + d) * kFan + v % kVectors * kLanes);
#pragma GCC unroll 16
            for (int i = 0; i < Q; ++i) {
                const Vec y = broadcast(rows[i * dims + d]);
#pragma GCC unroll 8
                for (int v = 0; v < C * kVectors; ++v) sum[i][v] -= x[v] * y;
            }
        }
        for (int i = 0; i < Q; ++i) {
            for (int v = 0; v < C * kVectors; ++v) {
                uint32_t mask = not_above(sum[i][v], broadcast(group.product_threshold[q + i]));
                for (; mask; mask &= mask - 1) {
                    const int lane = __builtin_ctz(mask);
                    const float squared = std::max(0.0f, 2 * sum[i][v][lane] + group.norm[q + i]);
                    if (squared <= group.threshold[q + i])
                        group.insert(q + i, squared, static_cast<uint32_t>(first_block * kFan + v * kLanes + lane));
                }
            }
        }
    }
}

void scan_all(const Tree& tree, Group& group) {
#if defined(__AVX512F__)
    constexpr int kQueries = 8, kTogether = 2;
#elif defined(__AVX2__)
    constexpr int kQueries = 4, kTogether = 1;
#else
    constexpr int kQueries = 2, kTogether = 1;
#endif
    int64_t block = 0;
    for (; block + kTogether <= tree.blocks; block += kTogether) scan_products<kQueries, kTogether>(tree, group, block);
    for (; block < tree.blocks; ++block) scan_products<kQueries, 1>(tree, group, block);
}

}  // namespace
}  // namespace sdw::SDW_ISA
