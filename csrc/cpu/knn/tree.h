// A balanced kd-tree over the pruning coordinates, fan 16, whose nodes are packed like points: 16 siblings, axis by
// axis.
//
// Its leaves are blocks of 16 points; 16 blocks are a cell, 16 cells a node, and so on. One test against a pack of
// boxes is then the same arithmetic as one against a block of points.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "../team.h"
#include "block.h"
#include "sdw/isa.h"
#include "sdw/memory.h"

namespace sdw::SDW_ISA {
namespace {

// Boxes of up to 16 sibling nodes, axis by axis.
struct Level {
    int64_t packs = 0;                // groups of 16 nodes
    Aligned<float> low, high;         // [packs][dims][16]
    std::vector<uint32_t> min_index;  // [packs * 16] lowest row below each node
};

struct Tree {
    KnnPoints references;
    double scale;
    int64_t blocks;
    Aligned<float> coordinates;  // [blocks][dims][16]
    Aligned<float> half_norm;    // [blocks * 16] ‖x‖²/2
    std::vector<uint32_t> row;   // [blocks * 16] row of the references at a place; kNoRow for padding
    std::vector<Level> levels;   // boxes of blocks in packs of 16, the cells; of cells; ...; the last has one pack
    Aligned<float> cell_box;     // [cells][2][dims] low, high

    Tree(const KnnPoints& points, double scale_) : references(points), scale(scale_) {
        const int64_t dims = points.dims;
        blocks = (points.rows + kFan - 1) / kFan;
        // Two copies of the coordinates while sorting, boxes for an eighth of them, rows and sort keys.
        const size_t needed = static_cast<size_t>(blocks) * kFan * (9 * dims + 16);
        if (needed > available_memory())
            throw OutOfMemory("the tree over " + std::to_string(points.rows) + " points of " + std::to_string(dims) +
                              " numbers needs " + std::to_string(needed >> 20) + " MiB; " +
                              std::to_string(available_memory() >> 20) + " MiB are available");
        coordinates = allocate<float>(blocks * kFan * dims);
        half_norm = allocate<float>(blocks * kFan);
        row.resize(blocks * kFan);
        {
            Aligned<float> other = allocate<float>(blocks * kFan * dims);
            std::vector<uint32_t> other_row(blocks * kFan);
            std::iota(other_row.begin(), other_row.end(), 0u);
            split(0, blocks, {points.coordinates, other_row.data()}, {coordinates.get(), row.data()},
                  {other.get(), other_row.data()}, num_threads());
        }
        build_levels();
    }

  private:
    struct Rows {
        const float* coordinates;
        const uint32_t* row;
    };
    struct Buffer {
        float* coordinates;
        uint32_t* row;
    };

    // Sorts blocks [first, last) apart in at most so many threads: `from` holds their rows; `to` and `spare` may be
    // overwritten (spare may be from).
    void split(int64_t first, int64_t last, Rows from, Buffer to, Buffer spare, int threads) {
        const int64_t dims = references.dims, begin = first * kFan, end = std::min(last * kFan, references.rows);
        if (last - first == 1) {
            finish_block(first, begin, end, from);
            return;
        }
        // Splits fall on multiples of the largest power of 16 blocks below the range: every pack is a subtree.
        int64_t unit = 1;
        while (unit * kFan < last - first) unit *= kFan;
        const int64_t units = (last - first + unit - 1) / unit, middle = first + (units + 1) / 2 * unit;
        const int64_t left = middle * kFan - begin;

        const int64_t axis = widest_axis(begin, end, from);
        std::vector<float> keys(end - begin);
        for (int64_t i = begin; i < end; ++i) keys[i - begin] = from.coordinates[i * dims + axis];
        std::nth_element(keys.begin(), keys.begin() + left, keys.end());
        const float pivot = keys[left];
        int64_t equal = left - std::count_if(keys.begin(), keys.begin() + left, [&](float x) { return x < pivot; });
        keys = {};
        // Stable, so that equal rows stay in the order of their index.
        int64_t low = begin, high = begin + left;
        for (int64_t i = begin; i < end; ++i) {
            const float key = from.coordinates[i * dims + axis];
            const bool goes_left = key < pivot || (key == pivot && equal-- > 0);
            const int64_t place = goes_left ? low++ : high++;
            std::copy_n(from.coordinates + i * dims, dims, to.coordinates + place * dims);
            to.row[place] = from.row[i];
        }
        const Rows moved{to.coordinates, to.row};
        if (threads > 1 && end - begin > 16384) {
            Team::run(2, [&](int member, const Team& team) {
                if (member == 0) split(middle, last, moved, spare, to, threads / 2);
                if (member == 1 || team.size() == 1) split(first, middle, moved, spare, to, threads - threads / 2);
            });
        } else {
            split(first, middle, moved, spare, to, 1);
            split(middle, last, moved, spare, to, 1);
        }
    }

    int64_t widest_axis(int64_t begin, int64_t end, Rows from) const {
        const int64_t dims = references.dims, step = std::max<int64_t>(1, (end - begin) / 1024);
        std::vector<double> sum(dims), square(dims);
        int64_t count = 0;
        for (int64_t i = begin; i < end; i += step, ++count)
            for (int64_t d = 0; d < dims; ++d) {
                const double x = from.coordinates[i * dims + d];
                sum[d] += x;
                square[d] += x * x;
            }
        int64_t axis = 0;
        double widest = -1;
        for (int64_t d = 0; d < dims; ++d) {
            const double variance = square[d] - sum[d] * sum[d] / static_cast<double>(count);
            if (variance > widest) widest = variance, axis = d;
        }
        return axis;
    }

    void finish_block(int64_t block, int64_t begin, int64_t end, Rows from) {
        const int64_t dims = references.dims;
        const std::vector<float> rows(from.coordinates + begin * dims, from.coordinates + end * dims);
        const std::vector<uint32_t> index(from.row + begin, from.row + end);
        float* x = coordinates.get() + block * dims * kFan;
        for (int64_t i = 0; i < kFan; ++i) {
            const bool real = i < end - begin;
            double norm = 0;
            for (int64_t d = 0; d < dims; ++d) {
                x[d * kFan + i] = real ? rows[i * dims + d] : kFar;
                norm += static_cast<double>(x[d * kFan + i]) * x[d * kFan + i];
            }
            half_norm[block * kFan + i] = real ? static_cast<float>(norm / 2) : kInfinity;
            row[block * kFan + i] = real ? index[i] : kNoRow;
        }
    }

    // Boxes of the blocks, then of ever larger nodes. Padding is a box at kFar, out of everyone's reach.
    void build_levels() {
        const int64_t dims = references.dims;
        for (int64_t nodes = blocks; levels.empty() || nodes > 1; nodes = levels.back().packs) {
            Level level;
            level.packs = (nodes + kFan - 1) / kFan;
            level.low = allocate<float>(level.packs * dims * kFan);
            level.high = allocate<float>(level.packs * dims * kFan);
            level.min_index.assign(level.packs * kFan, kNoRow);
            std::fill_n(level.low.get(), level.packs * dims * kFan, kFar);
            std::fill_n(level.high.get(), level.packs * dims * kFan, kFar);
            // A node's children are a row of 16 numbers an axis: points of a block, or boxes of a pack one level below.
            const float* child_low = levels.empty() ? coordinates.get() : levels.back().low.get();
            const float* child_high = levels.empty() ? coordinates.get() : levels.back().high.get();
            const uint32_t* child_index = levels.empty() ? row.data() : levels.back().min_index.data();
            for (int64_t node = 0; node < nodes; ++node) {
                for (int64_t d = 0; d < dims; ++d) {
                    float low = kFar, high = -kFar;
                    for (int64_t i = (node * dims + d) * kFan; i < (node * dims + d + 1) * kFan; ++i) {
                        low = std::min(low, child_low[i]);
                        if (child_high[i] != kFar) high = std::max(high, child_high[i]);
                    }
                    level.low[(node / kFan * dims + d) * kFan + node % kFan] = low;
                    level.high[(node / kFan * dims + d) * kFan + node % kFan] = high;
                }
                level.min_index[node] = *std::min_element(child_index + node * kFan, child_index + (node + 1) * kFan);
            }
            levels.push_back(std::move(level));
        }
        const int64_t cells = levels[0].packs;
        cell_box = allocate<float>(cells * 2 * dims);
        for (int64_t i = 0; i < cells * dims; ++i) {
            const float* low = levels[0].low.get() + i * kFan;
            const float* high = levels[0].high.get() + i * kFan;
            float* box = cell_box.get() + i / dims * 2 * dims + i % dims;
            box[0] = *std::min_element(low, low + kFan);
            box[dims] = -kFar;
            for (int lane = 0; lane < kFan; ++lane)
                if (high[lane] != kFar) box[dims] = std::max(box[dims], high[lane]);
        }
    }
};

// Squared distances of the 16 boxes of a pack from what is `gap` away from boxes [low, high] on axis d; those beyond
// `reach` may be smaller than they are.
template <typename Gap>
inline Block box_distances(const Level& level, int64_t pack, int64_t dims, float reach, const Gap& gap) {
    Block sum{};
    const float* box_low = level.low.get() + pack * dims * kFan;
    const float* box_high = level.high.get() + pack * dims * kFan;
    for (int64_t begin = 0; begin < dims; begin += kStep) {
        add_gaps(sum, begin, std::min(kStep, dims - begin), [&](int64_t d, int v) {
            const int64_t at = d * kFan + v * kLanes;
            return gap(d, load(box_low + at), load(box_high + at));
        });
        if (!not_above(sum, reach)) break;
    }
    return sum;
}

// From the box [low, high].
inline Block box_distances(const Level& level, int64_t pack, int64_t dims, const float* low, const float* high,
                           float reach) {
    return box_distances(level, pack, dims, reach, [&](int64_t d, Vec box_low, Vec box_high) {
        return larger(larger(box_low - broadcast(high[d]), broadcast(low[d]) - box_high), Vec{});
    });
}

// From the point y.
inline Block box_distances(const Level& level, int64_t pack, int64_t dims, const float* y, float reach) {
    return box_distances(level, pack, dims, reach, [&](int64_t d, Vec box_low, Vec box_high) {
        return outside(broadcast(y[d]), box_low, box_high);
    });
}

}  // namespace
}  // namespace sdw::SDW_ISA
