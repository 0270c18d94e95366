// One walk through the tree for a group of up to 16 queries: what is farther from the group's box than its largest
// threshold is dropped, near cells come first so that thresholds are tight early. A cell's box is tested against all
// queries at once, the boxes of its blocks against each query that remains, and a query's blocks are scanned several at
// a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "group.h"

namespace sdw::SDW_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kPending = 8;  // blocks that a query scans together: as many sums as registers take
#elif defined(__AVX2__)
constexpr int kPending = 4;
#else
constexpr int kPending = 2;
#endif

class Walk {
  public:
    Walk(const Tree& tree, Group& group) : tree_(tree), group_(group), dims_(group.dims) {}

    // Fills the group's lists, beginning with block `start`, in or next to which the queries lie.
    void run(uint32_t start);

  private:
    struct Near {
        float distance;
        uint32_t cell;
    };

    void mark_unresolved();
    void collect(int level, int64_t pack, float reach, int64_t except);
    void visit_collected(float reach, uint32_t except);
    void test_cell(uint32_t cell);
    void test_blocks(int query, uint32_t cell, uint32_t except);
    void want_block(int query, uint32_t block);
    void scan_wanted();
    template <int B>
    void scan_blocks(int query);

    const Tree& tree_;
    Group& group_;
    const int64_t dims_;
    uint32_t wanted_[kFan][kPending];  // blocks that a query has yet to scan
    int wanted_count_[kFan] = {};
    std::vector<Near> near_, sorted_;
};

void Walk::run(uint32_t start) {
    const uint32_t start_cell = start / kFan;
    for (int q = 0; q < group_.count; ++q) want_block(q, start);
    scan_wanted();
    for (int q = 0; q < group_.count; ++q) test_blocks(q, start_cell, start);
    scan_wanted();
    const int top = static_cast<int>(tree_.levels.size()) - 1;
    const int64_t start_pack = start_cell / kFan;
    if (top > 0) {
        near_.clear();
        const float reach = group_.largest_threshold();
        collect(1, start_pack, reach, -1);
        visit_collected(reach, start_cell);
    }
    mark_unresolved();
    const float reach = group_.largest_threshold();
    if (top > 0 && reach >= 0) {
        near_.clear();
        collect(top, 0, reach, start_pack);
        visit_collected(reach, start_cell);
    }
}

// Where neighbors are closer than float resolves, thresholds mean nothing.
void Walk::mark_unresolved() {
    for (int q = 0; q < group_.count; ++q) {
        const float kth = key_distance(group_.list(q)[group_.k - 1]);
        if (kth < kNone && group_.threshold[q] > 4 * kth) {
            group_.exact[q] = true;
            group_.threshold[q] = -1;
        }
    }
}

// Appends the cells below a pack within reach of the group to near_, except those of the pack `except` of cells.
void Walk::collect(int level, int64_t pack, float reach, int64_t except) {
    if (level == 1 && pack == except) return;
    const Block distances = box_distances(tree_.levels[level], pack, dims_, group_.low.get(), group_.high.get(), reach);
    group_.work += 3 * dims_;
    alignas(64) float distance[kFan];
    store_block(distance, distances);
    for (uint32_t mask = not_above(distances, reach); mask; mask &= mask - 1) {
        const int lane = __builtin_ctz(mask);
        if (level == 1)
            near_.push_back({distance[lane], static_cast<uint32_t>(pack * kFan + lane)});
        else
            collect(level - 1, pack * kFan + lane, reach, except);
    }
}

// Visits the collected cells, near ones first: sorted into 64 classes of distance, as thresholds shrink slowly.
void Walk::visit_collected(float reach, uint32_t except) {
    constexpr int kClasses = 64;
    int32_t begin[kClasses + 1] = {};
    const float per_class = reach > 0 ? kClasses / reach : 0;
    const auto class_of = [&](const Near& near) {
        return std::min(kClasses - 1, static_cast<int>(near.distance * per_class));
    };
    for (const Near& near : near_) ++begin[class_of(near) + 1];
    for (int i = 0; i < kClasses; ++i) begin[i + 1] += begin[i];
    sorted_.resize(near_.size());
    for (const Near& near : near_) sorted_[begin[class_of(near)]++] = near;
    for (const Near& near : sorted_)
        if (near.cell != except && near.distance <= group_.largest_threshold()) test_cell(near.cell);
    scan_wanted();
}

// Tests a cell's box against all queries of the group at once.
void Walk::test_cell(uint32_t cell) {
    const float* low = tree_.cell_box.get() + cell * 2 * dims_;
    const float* high = low + dims_;
    Block sum{};
    uint32_t mask = 0;
    for (int64_t begin = 0; begin < dims_; begin += kStep) {
        add_gaps(sum, begin, std::min(kStep, dims_ - begin), [&](int64_t d, int v) {
            const Vec x = load(group_.lanes.get() + d * kFan + v * kLanes);
            return larger(larger(broadcast(low[d]) - x, x - broadcast(high[d])), Vec{});
        });
        mask = 0;
        for (int v = 0; v < kVectors; ++v)
            mask |= not_above(sum.part[v], load(group_.threshold + v * kLanes)) << (v * kLanes);
        if (!mask) break;
    }
    group_.work += 3 * dims_;
    for (; mask; mask &= mask - 1) test_blocks(__builtin_ctz(mask), cell, kNoRow);
}

// Tests the boxes of a cell's blocks against a query; asks for those within reach.
void Walk::test_blocks(int q, uint32_t cell, uint32_t except) {
    const float* y = group_.rows.get() + q * dims_;
    const Block distances = box_distances(tree_.levels[0], cell, dims_, y, y, group_.threshold[q]);
    group_.work += 3 * dims_;
    for (uint32_t mask = not_above(distances, group_.threshold[q]); mask; mask &= mask - 1) {
        const uint32_t block = cell * kFan + __builtin_ctz(mask);
        if (block != except) want_block(q, block);
    }
}

inline void Walk::want_block(int q, uint32_t block) {
    wanted_[q][wanted_count_[q]++] = block;
    __builtin_prefetch(tree_.coordinates.get() + block * dims_ * kFan);
    if (wanted_count_[q] == kPending) {
        scan_blocks<kPending>(q);
        wanted_count_[q] = 0;
    }
}

// Scans what is left over.
void Walk::scan_wanted() {
    for (int q = 0; q < group_.count; ++q) {
        for (int b = 0; b < wanted_count_[q]; ++b) {
            std::swap(wanted_[q][0], wanted_[q][b]);
            scan_blocks<1>(q);
        }
        wanted_count_[q] = 0;
    }
}

// Scans the B blocks that a query wants: B + 1 loads, B subtractions and multiply-adds an axis.
template <int B>
void Walk::scan_blocks(int q) {
    const float* y = group_.rows.get() + q * dims_;
    const float& threshold = group_.threshold[q];  // an insertion lowers it
    const uint32_t* blocks = wanted_[q];
    const float* x[B];
    for (int b = 0; b < B; ++b) x[b] = tree_.coordinates.get() + blocks[b] * dims_ * kFan;
    Block sum[B];
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) sum[b] = Block{};
    for (int64_t begin = 0; begin < dims_; begin += 3 * kStep) {
        for (int64_t d = begin; d < std::min(begin + 3 * kStep, dims_); ++d) {
            const Vec value = broadcast(y[d]);
#pragma GCC unroll 8
            for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) {
                    const Vec difference = load(x[b] + d * kFan + v * kLanes) - value;
                    sum[b].part[v] += difference * difference;
                }
        }
        uint32_t any = 0;
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) any |= not_above(sum[b], threshold);
        group_.work += B * (3 * kStep + 4);
        if (!any) return;
    }
    for (int b = 0; b < B; ++b) {
        uint32_t mask = not_above(sum[b], threshold);
        if (!mask) continue;
        alignas(64) float squared[kFan];
        store_block(squared, sum[b]);
        for (; mask; mask &= mask - 1) {
            const int lane = __builtin_ctz(mask);
            if (squared[lane] <= threshold) group_.insert(q, squared[lane], blocks[b] * kFan + lane);
        }
    }
}

}  // namespace
}  // namespace sdw::SDW_ISA
