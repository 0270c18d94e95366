// One walk through the tree for many groups of up to 16 queries that lie next to each other, so that what it reads
// comes out of memory once for all of them: where the points do not fit the caches, reading a block costs several times
// what it takes to scan it for one query. What is farther from a group's box than its largest threshold is dropped,
// near cells come first so that thresholds are tight early. A cell's box is tested against the 16 queries of a group at
// once, the boxes of its blocks against each query that remains, and a block is scanned for several of the queries that
// want it at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <vector>

#include "group.h"

namespace sdw::SDW_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kScanned = 8;  // queries that a block is scanned for at a time: as many sums as registers take
#elif defined(__AVX2__)
constexpr int kScanned = 4;
#else
constexpr int kScanned = 2;
#endif
constexpr int kTogether = 32;  // groups that walk together: a bit each

class Walk {
  public:
    Walk(const Tree& tree, std::deque<Group>& groups)
        : tree_(tree), dims_(groups[0].dims), wanted_(kFan * kTogether * kFan) {
        for (Group& group : groups) group_.push_back(&group);
    }

    // Fills the lists of the first `count` groups, which lie in or next to blocks start[0], start[1], ... of one node.
    void run(const uint32_t* start, int count);

  private:
    // A cell, and how far it is from the box of each group.
    struct Near {
        alignas(64) float distance[kTogether];
        float nearest;  // the least of them, each divided by the reach
        uint32_t cell;
    };

    void look_around(int g, uint32_t start);
    void visit_near(int level, int64_t pack, int64_t except, const uint32_t* start);
    void collect(int level, int64_t pack, int64_t except);
    uint32_t groups_within(const float* distance) const;
    uint32_t test_cell(Group& group, uint32_t cell);
    void want_blocks(int g, uint32_t queries, uint32_t cell, uint32_t except);
    void want_block(int g, int query, int block) {
        wanted_[block * kTogether * kFan + wanted_count_[block]++] = static_cast<uint16_t>(g * kFan + query);
    }
    void scan_wanted(uint32_t cell);
    template <int Q>
    void scan_block(uint32_t block, const uint16_t* query);

    const Tree& tree_;
    std::vector<Group*> group_;
    const int64_t dims_;
    int count_ = 0;                       // groups of this walk
    alignas(64) float reach_[kTogether];  // largest threshold of each; -1 beyond the last
    std::vector<Near> near_;
    std::vector<uint32_t> order_;   // of near_
    std::vector<uint16_t> wanted_;  // [16][512] queries, 16 g + q, that have yet to scan each block of a cell
    int32_t wanted_count_[kFan] = {};
};

void Walk::run(const uint32_t* start, int count) {
    count_ = count;
    std::fill_n(reach_, kTogether, -1.0f);
    for (int g = 0; g < count; ++g) look_around(g, start[g]);
    const int top = static_cast<int>(tree_.levels.size()) - 1;
    const int64_t start_pack = start[0] / kFan / kFan;
    if (top > 0) visit_near(1, start_pack, -1, start);
    for (int g = 0; g < count; ++g) group_[g]->mark_unresolved();
    if (top > 0) visit_near(top, 0, start_pack, start);
}

// Looks at block `start`, in or next to which the queries of a group lie, then at the others of its cell.
void Walk::look_around(int g, uint32_t start) {
    const uint32_t cell = start / kFan;
    for (int q = 0; q < group_[g]->count; ++q) want_block(g, q, static_cast<int>(start % kFan));
    scan_wanted(cell);
    want_blocks(g, (1u << group_[g]->count) - 1, cell, start);
    scan_wanted(cell);
}

// Visits the cells below a pack within reach of a group, except those of the pack `except` of cells. Near ones come
// first: sorted into 64 classes of distance, as thresholds shrink slowly.
void Walk::visit_near(int level, int64_t pack, int64_t except, const uint32_t* start) {
    constexpr int kClasses = 64;
    near_.clear();
    for (int g = 0; g < count_; ++g) reach_[g] = group_[g]->largest_threshold();
    collect(level, pack, except);
    int32_t begin[kClasses + 1] = {};
    const auto class_of = [&](const Near& near) {
        return static_cast<int>(std::min(kClasses - 1.0f, near.nearest * kClasses));
    };
    for (const Near& near : near_) ++begin[class_of(near) + 1];
    for (int i = 0; i < kClasses; ++i) begin[i + 1] += begin[i];
    order_.resize(near_.size());
    for (size_t i = 0; i < near_.size(); ++i) order_[begin[class_of(near_[i])]++] = static_cast<uint32_t>(i);
    for (const uint32_t i : order_) {
        const Near& near = near_[i];
        uint32_t wanting = 0;  // groups of which a query is within reach
        for (uint32_t within = groups_within(near.distance); within; within &= within - 1) {
            const int g = __builtin_ctz(within);
            if (near.cell == start[g] / kFan) continue;
            const uint32_t queries = test_cell(*group_[g], near.cell);
            if (!queries) continue;
            want_blocks(g, queries, near.cell, kNoRow);
            wanting |= 1u << g;
        }
        scan_wanted(near.cell);
        for (; wanting; wanting &= wanting - 1) {
            const int g = __builtin_ctz(wanting);
            reach_[g] = group_[g]->largest_threshold();
        }
    }
}

// Bit g says whether group g has a query that may reach as far.
uint32_t Walk::groups_within(const float* distance) const {
    uint32_t groups = 0;
    for (int i = 0; i < kTogether; i += kLanes) groups |= not_above(load(distance + i), load(reach_ + i)) << i;
    return groups;
}

// Appends the cells below a pack to near_.
void Walk::collect(int level, int64_t pack, int64_t except) {
    if (level == 1 && pack == except) return;
    alignas(64) float distance[kTogether][kFan];
    uint32_t any = 0;
    for (int g = 0; g < count_; ++g) {
        Group& group = *group_[g];
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
        Near& near = near_.emplace_back();
        near.cell = static_cast<uint32_t>(node);
        near.nearest = kInfinity;
        for (int g = 0; g < kTogether; ++g) {
            near.distance[g] = g < count_ ? distance[g][lane] : kInfinity;
            if (reach_[g] > 0) near.nearest = std::min(near.nearest, near.distance[g] / reach_[g]);
        }
    }
}

// Tests a cell's box against all queries of a group at once. Bit q says whether query q reaches it.
uint32_t Walk::test_cell(Group& group, uint32_t cell) {
    const float* low = tree_.cell_box.get() + cell * 2 * dims_;
    const float* high = low + dims_;
    Block sum{};
    uint32_t mask = 0;
    for (int64_t begin = 0; begin < dims_; begin += kStep) {
        add_gaps(sum, begin, std::min(kStep, dims_ - begin), [&](int64_t d, int v) {
            return outside(load(group.lanes.get() + d * kFan + v * kLanes), broadcast(low[d]), broadcast(high[d]));
        });
        mask = 0;
        for (int v = 0; v < kVectors; ++v)
            mask |= not_above(sum.part[v], load(group.threshold + v * kLanes)) << (v * kLanes);
        if (!mask) break;
    }
    group.work += 3 * dims_;
    return mask;
}

// Tests the boxes of a cell's blocks against some queries of a group, and notes which want which.
void Walk::want_blocks(int g, uint32_t queries, uint32_t cell, uint32_t except) {
    Group& group = *group_[g];
    for (; queries; queries &= queries - 1) {
        const int q = __builtin_ctz(queries);
        const float* y = group.rows.get() + q * dims_;
        const Block distances = box_distances(tree_.levels[0], cell, dims_, y, group.threshold[q]);
        group.work += 3 * dims_;
        for (uint32_t mask = not_above(distances, group.threshold[q]); mask; mask &= mask - 1) {
            const int block = __builtin_ctz(mask);
            if (cell * kFan + block != except) want_block(g, q, block);
        }
    }
}

// Scans the blocks of a cell for the queries that want them.
void Walk::scan_wanted(uint32_t cell) {
    for (int b = 0; b < kFan; ++b) {
        const uint32_t block = cell * kFan + b;
        const uint16_t* query = wanted_.data() + b * kTogether * kFan;
        int left = wanted_count_[b];
        for (; left >= kScanned; left -= kScanned, query += kScanned) scan_block<kScanned>(block, query);
        for (; left >= 2; left -= 2, query += 2) scan_block<2>(block, query);
        if (left) scan_block<1>(block, query);
        wanted_count_[b] = 0;
    }
}

// Adds to the squared distances of Q queries from a block what axes [begin, end) contribute: Q + 1 loads, Q
// subtractions and multiply-adds an axis and vector. The sums are local, so that they stay in registers.
template <int Q>
inline void add_axes(Block (&sums)[Q], const float* x, const float* const (&y)[Q], int64_t begin, int64_t end) {
    Block sum[Q];
#pragma GCC unroll 8
    for (int i = 0; i < Q; ++i) sum[i] = sums[i];
    for (int64_t d = begin; d < end; ++d) {
        Block at;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) at.part[v] = load(x + d * kFan + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < Q; ++i) {
            const Vec value = broadcast(y[i][d]);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                const Vec difference = at.part[v] - value;
                sum[i].part[v] += difference * difference;
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Q; ++i) sums[i] = sum[i];
}

// Scans a block for Q queries.
template <int Q>
void Walk::scan_block(uint32_t block, const uint16_t* query) {
    const float* x = tree_.coordinates.get() + block * dims_ * kFan;
    Group* group[Q];
    int row[Q];
    const float* y[Q];
    float threshold[Q];
#pragma GCC unroll 8
    for (int i = 0; i < Q; ++i) {
        group[i] = group_[query[i] / kFan];
        row[i] = query[i] % kFan;
        y[i] = group[i]->rows.get() + row[i] * dims_;
        threshold[i] = group[i]->threshold[row[i]];
    }
    Block sum[Q] = {};
    uint32_t within[Q] = {};
    for (int64_t begin = 0; begin < dims_; begin += 3 * kStep) {
        add_axes(sum, x, y, begin, std::min(begin + 3 * kStep, dims_));
        uint32_t any = 0;
#pragma GCC unroll 8
        for (int i = 0; i < Q; ++i) {
            within[i] = not_above(sum[i], threshold[i]);
            any |= within[i];
            group[i]->work += 3 * kStep + 4;
        }
        if (!any) return;
    }
    for (int i = 0; i < Q; ++i) {
        if (!within[i]) continue;
        alignas(64) float squared[kFan];
        store_block(squared, sum[i]);
        for (; within[i]; within[i] &= within[i] - 1) {
            const int lane = __builtin_ctz(within[i]);
            if (squared[lane] <= group[i]->threshold[row[i]])  // an insertion lowers it
                group[i]->insert(row[i], squared[lane], block * kFan + static_cast<uint32_t>(lane));
        }
    }
}

}  // namespace
}  // namespace sdw::SDW_ISA
