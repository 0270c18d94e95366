// One walk through the tree for several groups of up to 16 queries that lie next to each other, so that what it reads
// comes into the caches once for all of them. What is farther from a group's box than its largest threshold is dropped,
// near cells come first so that thresholds are tight early. A cell's box is tested against all queries of a group at
// once, the boxes of its blocks against each query that remains, and a query's blocks are scanned several at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
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
constexpr int kTogether = 8;  // groups that walk together

// What one group of a walk has to do with a cell.
class Probe {
  public:
    Probe(const Tree& tree, Group& group) : tree_(tree), group_(group), dims_(group.dims) {}

    // Looks at block `start`, in or next to which the queries lie, then at the others of its cell.
    void look_around(uint32_t start);
    void mark_unresolved();
    void test_cell(uint32_t cell);
    void scan_wanted();

  private:
    void test_blocks(int query, uint32_t cell, uint32_t except);
    void want_block(int query, uint32_t block);
    template <int B>
    void scan_blocks(int query);

    const Tree& tree_;
    Group& group_;
    const int64_t dims_;
    uint32_t wanted_[kFan][kPending];  // blocks that a query has yet to scan
    int wanted_count_[kFan] = {};
};

class Walk {
  public:
    Walk(const Tree& tree, std::deque<Group>& groups) : tree_(tree), groups_(groups), dims_(groups[0].dims) {
        for (Group& group : groups) probes_.emplace_back(tree, group);
    }

    // Fills the lists of the first `count` groups, which lie in or next to blocks start[0], start[1], ... of one node.
    void run(const uint32_t* start, int count);

  private:
    struct Near {
        uint32_t cell;
        float nearest;  // the least of the distances, each divided by the reach
        float distance[kTogether];
    };

    void visit_near(int level, int64_t pack, int64_t except, const uint32_t* start);
    void collect(int level, int64_t pack, int64_t except);

    const Tree& tree_;
    std::deque<Group>& groups_;
    const int64_t dims_;
    std::deque<Probe> probes_;
    int count_ = 0;           // groups of this walk
    float reach_[kTogether];  // largest threshold of each
    std::vector<Near> near_, sorted_;
};

void Walk::run(const uint32_t* start, int count) {
    count_ = count;
    for (int g = 0; g < count; ++g) probes_[g].look_around(start[g]);
    const int top = static_cast<int>(tree_.levels.size()) - 1;
    const int64_t start_pack = start[0] / kFan / kFan;
    if (top > 0) visit_near(1, start_pack, -1, start);
    for (int g = 0; g < count; ++g) probes_[g].mark_unresolved();
    if (top > 0) visit_near(top, 0, start_pack, start);
}

// Visits the cells below a pack within reach of a group, except those of the pack `except` of cells. Near ones come
// first: sorted into 64 classes of distance, as thresholds shrink slowly.
void Walk::visit_near(int level, int64_t pack, int64_t except, const uint32_t* start) {
    constexpr int kClasses = 64;
    near_.clear();
    for (int g = 0; g < count_; ++g) reach_[g] = groups_[g].largest_threshold();
    collect(level, pack, except);
    int32_t begin[kClasses + 1] = {};
    const auto class_of = [&](const Near& near) {
        return static_cast<int>(std::min(kClasses - 1.0f, near.nearest * kClasses));
    };
    for (const Near& near : near_) ++begin[class_of(near) + 1];
    for (int i = 0; i < kClasses; ++i) begin[i + 1] += begin[i];
    sorted_.resize(near_.size());
    for (const Near& near : near_) sorted_[begin[class_of(near)]++] = near;
    for (const Near& near : sorted_)
        for (int g = 0; g < count_; ++g) {
            if (near.distance[g] > reach_[g] || near.cell == start[g] / kFan) continue;
            probes_[g].test_cell(near.cell);
            reach_[g] = groups_[g].largest_threshold();
        }
    for (int g = 0; g < count_; ++g) probes_[g].scan_wanted();
}

// Appends the cells below a pack to near_.
void Walk::collect(int level, int64_t pack, int64_t except) {
    if (level == 1 && pack == except) return;
    alignas(64) float distance[kTogether][kFan];
    uint32_t any = 0;
    for (int g = 0; g < count_; ++g) {
        Group& group = groups_[g];
        const Block distances =
            box_distances(tree_.levels[level], pack, dims_, group.low.get(), group.high.get(), reach_[g]);
        group.work += 3 * dims_;
        store_block(distance[g], distances);
        any |= not_above(distances, reach_[g]);
    }
    for (uint32_t mask = any; mask; mask &= mask - 1) {
        const int lane = __builtin_ctz(mask);
        const int64_t node = pack * kFan + lane;
        if (level > 1) {
            collect(level - 1, node, except);
            continue;
        }
        Near near{static_cast<uint32_t>(node), kInfinity, {}};
        for (int g = 0; g < count_; ++g) {
            near.distance[g] = distance[g][lane];
            if (reach_[g] > 0) near.nearest = std::min(near.nearest, near.distance[g] / reach_[g]);
        }
        near_.push_back(near);
    }
}

void Probe::look_around(uint32_t start) {
    for (int q = 0; q < group_.count; ++q) want_block(q, start);
    scan_wanted();
    for (int q = 0; q < group_.count; ++q) test_blocks(q, start / kFan, start);
    scan_wanted();
}

// Where neighbors are closer than float resolves, thresholds mean nothing.
void Probe::mark_unresolved() {
    for (int q = 0; q < group_.count; ++q) {
        const float kth = key_distance(group_.list(q)[group_.k - 1]);
        if (kth < kNone && group_.threshold[q] > 4 * kth) {
            group_.exact[q] = true;
            group_.threshold[q] = -1;
        }
    }
}

// Tests a cell's box against all queries of the group at once.
void Probe::test_cell(uint32_t cell) {
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
void Probe::test_blocks(int q, uint32_t cell, uint32_t except) {
    const float* y = group_.rows.get() + q * dims_;
    const Block distances = box_distances(tree_.levels[0], cell, dims_, y, y, group_.threshold[q]);
    group_.work += 3 * dims_;
    for (uint32_t mask = not_above(distances, group_.threshold[q]); mask; mask &= mask - 1) {
        const uint32_t block = cell * kFan + __builtin_ctz(mask);
        if (block != except) want_block(q, block);
    }
}

inline void Probe::want_block(int q, uint32_t block) {
    wanted_[q][wanted_count_[q]++] = block;
    __builtin_prefetch(tree_.coordinates.get() + block * dims_ * kFan);
    if (wanted_count_[q] == kPending) {
        scan_blocks<kPending>(q);
        wanted_count_[q] = 0;
    }
}

// Scans what is left over.
void Probe::scan_wanted() {
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
void Probe::scan_blocks(int q) {
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
