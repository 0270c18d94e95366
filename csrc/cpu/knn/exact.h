// The answer by double distances of the points as given: the candidates of a list are ranked by them; a query whose
// list ran full within its threshold is searched again, ranked by them from the start.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "group.h"

namespace sdw::SDW_ISA {
namespace {

class Exact {
  public:
    Exact(const Tree& tree, Group& group) : tree_(tree), group_(group), dims_(group.dims) {}

    // Writes the answers of the group's queries.
    void finish(int64_t* query, double* squared, int64_t* index);

  private:
    void rank_list(int query);
    void search_again(int query);
    void visit(int query, int level, int64_t pack);
    void scan_block(int query, int64_t block);
    float threshold(int query) const;
    bool settled(uint32_t row) const;
    double distance_to(int query, uint32_t row) const {
        return squared_distance(group_.queries, group_.query_row[query], tree_.references, row);
    }

    const Tree& tree_;
    Group& group_;
    const int64_t dims_;
    const KnnBounds bounds_ = KnnBounds::differences(dims_);
    float slack_ = 0;                                  // of the query that is searched again
    std::vector<std::pair<double, uint32_t>> ranked_;  // its best (distance, row), up to k; or those of a list
};

void Exact::finish(int64_t* query, double* squared, int64_t* index) {
    for (int q = 0; q < group_.count; ++q) {
        if (group_.exact[q] || key_distance(group_.dropped[q]) <= group_.threshold[q])
            search_again(q);
        else
            rank_list(q);
        query[q] = group_.query_row[q];
        const double reach = group_.reach_of(q);
        const auto found = static_cast<int64_t>(ranked_.size());
        for (int64_t i = 0; i < group_.k; ++i) {
            const bool counts = i < found && ranked_[i].first <= reach;
            squared[q * group_.k + i] = counts ? ranked_[i].first : std::numeric_limits<double>::infinity();
            index[q * group_.k + i] = counts ? static_cast<int64_t>(ranked_[i].second) : -1;
        }
    }
}

void Exact::rank_list(int q) {
    const int64_t* list = group_.list(q);
    const float threshold = group_.threshold[q];
    ranked_.clear();
    for (int64_t i = 0; i < group_.capacity && key_distance(list[i]) <= threshold; ++i) {
        const uint32_t row = tree_.row[key_place(list[i])];
        ranked_.emplace_back(0.0, row);
        __builtin_prefetch(address(tree_.references, row));
    }
    for (auto& [distance, row] : ranked_) distance = distance_to(q, row);
    std::sort(ranked_.begin(), ranked_.end());
}

void Exact::search_again(int q) {
    ranked_.clear();
    slack_ = bounds_.slack * group_.norm[q] + bounds_.floor;
    visit(q, static_cast<int>(tree_.levels.size()) - 1, 0);
}

// Children by (distance, lowest index): among equal rows the first k are found first, and then no others are looked at.
void Exact::visit(int q, int level, int64_t pack) {
    const float* y = group_.rows.get() + q * dims_;
    const Block distances = box_distances(tree_.levels[level], pack, dims_, y, y, threshold(q));
    group_.work += 3 * dims_;
    const uint32_t* min_index = tree_.levels[level].min_index.data() + pack * kFan;
    alignas(64) float distance[kFan];
    store_block(distance, distances);
    int order[kFan];
    int n = 0;
    for (uint32_t mask = not_above(distances, threshold(q)); mask; mask &= mask - 1) order[n++] = __builtin_ctz(mask);
    std::sort(order, order + n, [&](int a, int b) {
        return distance[a] < distance[b] || (distance[a] == distance[b] && min_index[a] < min_index[b]);
    });
    for (int i = 0; i < n; ++i) {
        const int lane = order[i];
        if (distance[lane] > threshold(q)) break;
        if (settled(min_index[lane])) continue;
        if (level == 0)
            scan_block(q, pack * kFan + lane);
        else
            visit(q, level - 1, pack * kFan + lane);
    }
}

void Exact::scan_block(int q, int64_t block) {
    const float* y = group_.rows.get() + q * dims_;
    const float* x = tree_.coordinates.get() + block * dims_ * kFan;
    Block sum{};
    for (int64_t d = 0; d < dims_; ++d)
        for (int v = 0; v < kVectors; ++v) {
            const Vec difference = load(x + d * kFan + v * kLanes) - broadcast(y[d]);
            sum.part[v] += difference * difference;
        }
    group_.work += dims_;
    for (uint32_t mask = not_above(sum, threshold(q)); mask; mask &= mask - 1) {
        const uint32_t row = tree_.row[block * kFan + __builtin_ctz(mask)];
        if (row == group_.self[q] || row == kNoRow || settled(row)) continue;
        const std::pair<double, uint32_t> found{distance_to(q, row), row};
        const bool full = static_cast<int64_t>(ranked_.size()) == group_.k;
        if (full && !(found < ranked_.back())) continue;
        if (full) ranked_.pop_back();
        ranked_.insert(std::upper_bound(ranked_.begin(), ranked_.end(), found), found);
        group_.work += dims_;
    }
}

// Bounds the float squared distance of what can still be among the k best.
float Exact::threshold(int q) const {
    const bool full = static_cast<int64_t>(ranked_.size()) == group_.k;
    const double scaled = (full ? ranked_.back().first : group_.reach_of(q)) * tree_.scale * tree_.scale;
    if (scaled > kNone / 4) return kNone;
    return static_cast<float>(scaled * bounds_.widen * (1 + 1e-6)) + slack_;
}

// Whether k rows at distance 0 are known, all before `row`: then it and later ones cannot matter.
inline bool Exact::settled(uint32_t row) const {
    return static_cast<int64_t>(ranked_.size()) == group_.k && ranked_.back().first == 0 && row > ranked_.back().second;
}

}  // namespace
}  // namespace sdw::SDW_ISA
