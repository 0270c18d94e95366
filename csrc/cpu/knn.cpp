// Exact k nearest neighbors by a join of blocks.
//
// References lie in blocks of 16, the leaves of a balanced kd-tree on the principal axes, each stored axis by axis so
// that 16 candidates are tested at once; 16 blocks are a cell, 16 cells a node, and so on, and the boxes of 16 siblings
// are stored and tested like candidates. Queries come in groups of up to 16 that share one walk down to the cells: what
// is farther from the group's box than its largest threshold is dropped, near cells come first so that thresholds are
// tight early. Each cell's box is then tested against all queries of the group at once, the boxes of its blocks against
// each query that remains, and a query's blocks are scanned several at a time.
//
// Exactness. The scan works on float coordinates; the answer is defined by double distances d of the points as given.
// With τ the k-th smallest float squared distance, T(τ) = widen·τ + slack bounds the float squared distance of every
// point whose true distance is not above the true k-th (`KnnBounds`). All candidates up to T are kept, in a list with
// room for more than k, and ranked by d at the end. Where the room did not suffice (many ties, or neighbors closer than
// float resolves) the query is searched again by `exact`, which ranks by d from the start.
#include "sdw/knn.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <future>
#include <limits>
#include <new>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "sdw/isa.h"
#include "sdw/knn_bounds.h"
#include "sdw/memory.h"
#include "simd.h"
#include "team.h"
#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

namespace sdw {
namespace SDW_ISA {
namespace {

constexpr int kFan = 16;       // points in a block, children of a node, queries in a group
constexpr int kBatch = 64;     // queries that share one pass over all references where the tree does not help
constexpr float kFar = 1e30f;  // coordinate of padding: its squared distance overflows to infinity
constexpr float kNone = std::numeric_limits<float>::max();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr uint32_t kNoRow = std::numeric_limits<uint32_t>::max();

// ---------------------------------------------------------------------------------------------------------------------
// Vectors: kVectors of them hold a block of 16 floats.

#if defined(__AVX512F__)
constexpr int kPending = 8;  // blocks that a query scans together: as many sums as registers take
#elif defined(__AVX2__)
constexpr int kPending = 4;
#else
constexpr int kPending = 2;
#endif
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

// A block of 16 floats.
struct Block {
    Vec part[kVectors];
};
inline uint32_t not_above(const Block& a, float b) {
    uint32_t mask = 0;
    for (int v = 0; v < kVectors; ++v) mask |= not_above(a.part[v], broadcast(b)) << (v * kLanes);
    return mask;
}

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
// Points

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

// ---------------------------------------------------------------------------------------------------------------------
// Tree

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
            auto others =
                std::async(std::launch::async, [=] { split(first, middle, moved, spare, to, threads - threads / 2); });
            split(middle, last, moved, spare, to, threads / 2);
            others.get();
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

constexpr int64_t kStep = 8;  // axes after which a test asks whether all 16 are out of reach already

// Adds the squared gaps between 16 intervals (or points) and 16 others along `axes` axes, given the four bounds of
// vector v on axis d. Two chains of sums, because one waits for its own multiply-add most of the time.
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

// Squared distances of the 16 boxes of a pack from the box [low, high]; those beyond `reach` may be smaller than they
// are.
inline Block box_distances(const Level& level, int64_t pack, int64_t dims, const float* low, const float* high,
                           float reach) {
    Block sum{};
    const float* box_low = level.low.get() + pack * dims * kFan;
    const float* box_high = level.high.get() + pack * dims * kFan;
    for (int64_t begin = 0; begin < dims; begin += kStep) {
        add_gaps(sum, begin, std::min(kStep, dims - begin), [&](int64_t d, int v) {
            const int64_t at = d * kFan + v * kLanes;
            return larger(larger(load(box_low + at) - broadcast(high[d]), broadcast(low[d]) - load(box_high + at)),
                          Vec{});
        });
        if (!not_above(sum, reach)) break;
    }
    return sum;
}

// ---------------------------------------------------------------------------------------------------------------------
// Search

struct Near {
    float distance;
    uint32_t cell;
};

// The search for one group of queries; a thread keeps one and loads group after group into it.
class Searcher {
  public:
    Searcher(const Tree& tree, const KnnPoints& queries, int64_t k, int64_t self_offset);

    // Takes up `count` queries, whose rows are `rows` and which lie in or next to block `home`: up to 16 for walk_tree,
    // up to 64 for scan_all.
    void load_group(const uint32_t* rows, int count, uint32_t home, const KnnBounds& bounds);
    void walk_tree();
    void scan_all();
    void finish(int64_t* query, double* squared, int64_t* index);

    int64_t work() const { return work_; }

  private:
    void collect(int level, int64_t pack, float reach, int64_t except);
    void visit_collected(float reach);
    void test_cell(uint32_t cell);
    void test_blocks(int query, uint32_t cell, uint32_t except);
    void want_block(int query, uint32_t block);
    void scan_wanted();
    template <int B>
    void scan_blocks(int query);
    template <int Q, int C>
    void scan_products(int64_t first_block);
    void insert(int query, float squared, uint32_t place);
    float largest_threshold() const;
    void exact(int query);
    void exact_visit(int query, int level, int64_t pack);
    void exact_block(int query, int64_t block);
    float exact_threshold(int query) const;
    bool settled(uint32_t row) const;

    const Tree& tree_;
    const KnnPoints queries_;
    const int64_t dims_, k_, self_offset_;
    const int64_t capacity_;  // of a list; a multiple of 8, with room beyond k
    const int64_t stride_;    // capacity_ and 8 in front, the last of which is a sentinel
    KnnBounds bounds_{};
    int count_ = 0;
    uint32_t home_ = 0;
    int64_t work_ = 0;  // operations on vectors of 16, about

    uint32_t query_row_[kBatch];
    uint32_t self_[kBatch];                        // row of the references that a query leaves out, or kNoRow
    Aligned<float> rows_;                          // [64][dims]
    Aligned<float> lanes_;                         // [dims][16]
    Aligned<float> low_, high_;                    // [dims] the group's box
    alignas(64) float threshold_[kBatch];          // T of each query; -1: wants none
    alignas(64) float product_threshold_[kBatch];  // the same for ‖x‖²/2 − qx
    float slack_[kBatch];
    float norm_[kBatch];
    bool exact_[kBatch];
    Aligned<int64_t> lists_;   // [64][stride] ascending keys: float bits of the squared distance, place
    int64_t dropped_[kBatch];  // least key that fell off a list
    uint32_t wanted_[kFan][kPending];
    int wanted_count_[kFan];
    std::vector<Near> near_, sorted_;
    std::vector<std::pair<double, uint32_t>> ranked_;  // of one query: (distance, row)
};

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

Searcher::Searcher(const Tree& tree, const KnnPoints& queries, int64_t k, int64_t self_offset)
    : tree_(tree),
      queries_(queries),
      dims_(queries.dims),
      k_(k),
      self_offset_(self_offset),
      capacity_((k + 5 + k / 8 + 7) / 8 * 8),
      stride_(capacity_ + 8),
      rows_(allocate<float>(kBatch * dims_)),
      lanes_(allocate<float>(kFan * dims_)),
      low_(allocate<float>(dims_)),
      high_(allocate<float>(dims_)),
      lists_(allocate<int64_t>(kBatch * stride_)) {}

void Searcher::load_group(const uint32_t* rows, int count, uint32_t home, const KnnBounds& bounds) {
    count_ = count;
    home_ = home;
    bounds_ = bounds;
    std::fill_n(low_.get(), dims_, kFar);
    std::fill_n(high_.get(), dims_, -kFar);
    // Places beyond the last query repeat it and want nothing.
    for (int q = 0; q < (count <= kFan ? kFan : kBatch); ++q) {
        const int64_t query = rows[std::min(q, count - 1)];
        const float* x = queries_.coordinates + query * dims_;
        double norm = 0;
        for (int64_t d = 0; d < dims_; ++d) {
            rows_[q * dims_ + d] = x[d];
            if (q < kFan) lanes_[d * kFan + q] = x[d];
            low_[d] = std::min(low_[d], x[d]);
            high_[d] = std::max(high_[d], x[d]);
            norm += static_cast<double>(x[d]) * x[d];
        }
        query_row_[q] = static_cast<uint32_t>(query);
        const int64_t self = query + self_offset_;
        self_[q] = self >= 0 && self < tree_.references.rows ? static_cast<uint32_t>(self) : kNoRow;
        norm_[q] = static_cast<float>(norm);
        slack_[q] = bounds.slack * norm_[q] + bounds.floor;
        threshold_[q] = q < count ? kNone : -1;
        product_threshold_[q] = q < count ? kNone : -kNone;
        exact_[q] = false;
        int64_t* list = lists_.get() + q * stride_;
        std::fill(list, list + 8, std::numeric_limits<int64_t>::min());
        std::fill(list + 8, list + stride_, make_key(kNone, kNoRow));
        dropped_[q] = std::numeric_limits<int64_t>::max();
    }
    std::fill_n(wanted_count_, kFan, 0);
}

// Into the sorted list, branch-free: list'[i] = min(list[i], max(list[i - 1], key)).
inline void Searcher::insert(int q, float squared, uint32_t place) {
    if (tree_.row[place] == self_[q]) return;
    const int64_t key = make_key(squared, place);
    int64_t* list = lists_.get() + q * stride_ + 8;
    dropped_[q] = std::min(dropped_[q], std::max(list[capacity_ - 1], key));
    for (int64_t at = capacity_ - 8; at >= 0; at -= 8) {
        int64_t shifted[8];
        for (int i = 0; i < 8; ++i) shifted[i] = std::max(list[at + i - 1], key);
        for (int i = 0; i < 8; ++i) list[at + i] = std::min(list[at + i], shifted[i]);
    }
    const float kth = key_distance(list[k_ - 1]);
    if (kth < kNone) {
        threshold_[q] = bounds_.widen * kth + slack_[q];
        product_threshold_[q] = (threshold_[q] - norm_[q]) / 2;
    }
}

// Scans the B blocks that a query wants: B + 1 loads, B subtractions and multiply-adds an axis.
template <int B>
void Searcher::scan_blocks(int q) {
    const float* y = rows_.get() + q * dims_;
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
        for (int b = 0; b < B; ++b) any |= not_above(sum[b], threshold_[q]);
        work_ += B * (3 * kStep + 4);
        if (!any) return;
    }
    for (int b = 0; b < B; ++b) {
        uint32_t mask = not_above(sum[b], threshold_[q]);
        if (!mask) continue;
        alignas(64) float squared[kFan];
        for (int v = 0; v < kVectors; ++v) store(squared + v * kLanes, sum[b].part[v]);
        for (; mask; mask &= mask - 1) {
            const int lane = __builtin_ctz(mask);
            if (squared[lane] <= threshold_[q]) insert(q, squared[lane], blocks[b] * kFan + lane);
        }
    }
}

inline void Searcher::want_block(int q, uint32_t block) {
    wanted_[q][wanted_count_[q]++] = block;
    __builtin_prefetch(tree_.coordinates.get() + block * dims_ * kFan);
    if (wanted_count_[q] == kPending) {
        scan_blocks<kPending>(q);
        wanted_count_[q] = 0;
    }
}

// Scans what is left over.
void Searcher::scan_wanted() {
    for (int q = 0; q < count_; ++q) {
        for (int b = 0; b < wanted_count_[q]; ++b) {
            std::swap(wanted_[q][0], wanted_[q][b]);
            scan_blocks<1>(q);
        }
        wanted_count_[q] = 0;
    }
}

// Tests the boxes of a cell's blocks against a query; asks for those within reach.
void Searcher::test_blocks(int q, uint32_t cell, uint32_t except) {
    const float* y = rows_.get() + q * dims_;
    const Block distances = box_distances(tree_.levels[0], cell, dims_, y, y, threshold_[q]);
    work_ += 3 * dims_;
    for (uint32_t mask = not_above(distances, threshold_[q]); mask; mask &= mask - 1) {
        const uint32_t block = cell * kFan + __builtin_ctz(mask);
        if (block != except) want_block(q, block);
    }
}

// Tests a cell's box against all queries of the group at once.
void Searcher::test_cell(uint32_t cell) {
    const float* low = tree_.cell_box.get() + cell * 2 * dims_;
    const float* high = low + dims_;
    Block sum{};
    uint32_t mask = 0;
    for (int64_t begin = 0; begin < dims_; begin += kStep) {
        add_gaps(sum, begin, std::min(kStep, dims_ - begin), [&](int64_t d, int v) {
            const Vec x = load(lanes_.get() + d * kFan + v * kLanes);
            return larger(larger(broadcast(low[d]) - x, x - broadcast(high[d])), Vec{});
        });
        mask = 0;
        for (int v = 0; v < kVectors; ++v)
            mask |= not_above(sum.part[v], load(threshold_ + v * kLanes)) << (v * kLanes);
        if (!mask) break;
    }
    work_ += 3 * dims_;
    for (; mask; mask &= mask - 1) test_blocks(__builtin_ctz(mask), cell, kNoRow);
}

float Searcher::largest_threshold() const {
    Vec largest = load(threshold_);
    for (int v = 1; v < kVectors; ++v) largest = larger(largest, load(threshold_ + v * kLanes));
    float result = -1;
    for (int i = 0; i < kLanes; ++i) result = std::max(result, largest[i]);
    return result;
}

// Appends the cells below a pack within reach of the group to near_, except those of the pack `except` of cells.
void Searcher::collect(int level, int64_t pack, float reach, int64_t except) {
    if (level == 1 && pack == except) return;
    const Block distances = box_distances(tree_.levels[level], pack, dims_, low_.get(), high_.get(), reach);
    work_ += 3 * dims_;
    alignas(64) float distance[kFan];
    for (int v = 0; v < kVectors; ++v) store(distance + v * kLanes, distances.part[v]);
    for (uint32_t mask = not_above(distances, reach); mask; mask &= mask - 1) {
        const int lane = __builtin_ctz(mask);
        if (level == 1)
            near_.push_back({distance[lane], static_cast<uint32_t>(pack * kFan + lane)});
        else
            collect(level - 1, pack * kFan + lane, reach, except);
    }
}

// Visits the collected cells, near ones first: sorted into 64 classes of distance, as thresholds shrink slowly.
void Searcher::visit_collected(float reach) {
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
        if (near.cell != home_ / kFan && near.distance <= largest_threshold()) test_cell(near.cell);
    scan_wanted();
}

void Searcher::walk_tree() {
    for (int q = 0; q < count_; ++q) want_block(q, home_);
    scan_wanted();
    for (int q = 0; q < count_; ++q) test_blocks(q, home_ / kFan, home_);
    scan_wanted();
    const int top = static_cast<int>(tree_.levels.size()) - 1;
    const int64_t home_pack = home_ / (kFan * kFan);
    if (top > 0) {
        near_.clear();
        const float reach = largest_threshold();
        collect(1, home_pack, reach, -1);
        visit_collected(reach);
    }
    // Where neighbors are closer than float resolves, thresholds mean nothing.
    for (int q = 0; q < count_; ++q) {
        const float kth = key_distance(lists_[q * stride_ + 8 + k_ - 1]);
        if (kth < kNone && threshold_[q] > 4 * kth) {
            exact_[q] = true;
            threshold_[q] = -1;
        }
    }
    const float reach = largest_threshold();
    if (top > 0 && reach >= 0) {
        near_.clear();
        collect(top, 0, reach, home_pack);
        visit_collected(reach);
    }
}

// Tests all queries, Q at a time, against C blocks by products, as a matrix multiplication does: s = ‖x‖²/2 − qx.
template <int Q, int C>
void Searcher::scan_products(int64_t first_block) {
    const float* block = tree_.coordinates.get() + first_block * dims_ * kFan;
    const float* half_norm = tree_.half_norm.get() + first_block * kFan;
    for (int q = 0; q < count_; q += Q) {
        const float* rows = rows_.get() + q * dims_;
        Vec sum[Q][C * kVectors];
        for (int i = 0; i < Q; ++i)
            for (int v = 0; v < C * kVectors; ++v) sum[i][v] = load(half_norm + v * kLanes);
        for (int64_t d = 0; d < dims_; ++d) {
            Vec x[C * kVectors];
#pragma GCC unroll 8
            for (int v = 0; v < C * kVectors; ++v)
                x[v] = load(block + (v / kVectors * dims_ + d) * kFan + v % kVectors * kLanes);
#pragma GCC unroll 16
            for (int i = 0; i < Q; ++i) {
                const Vec y = broadcast(rows[i * dims_ + d]);
#pragma GCC unroll 8
                for (int v = 0; v < C * kVectors; ++v) sum[i][v] -= x[v] * y;
            }
        }
        for (int i = 0; i < Q; ++i) {
            for (int v = 0; v < C * kVectors; ++v) {
                uint32_t mask = not_above(sum[i][v], broadcast(product_threshold_[q + i]));
                for (; mask; mask &= mask - 1) {
                    const int lane = __builtin_ctz(mask);
                    const float squared = std::max(0.0f, 2 * sum[i][v][lane] + norm_[q + i]);
                    if (squared <= threshold_[q + i])
                        insert(q + i, squared, static_cast<uint32_t>(first_block * kFan + v * kLanes + lane));
                }
            }
        }
    }
}

void Searcher::scan_all() {
#if defined(__AVX512F__)
    constexpr int kQueries = 8, kTogether = 2;
#elif defined(__AVX2__)
    constexpr int kQueries = 4, kTogether = 1;
#else
    constexpr int kQueries = 2, kTogether = 1;
#endif
    int64_t block = 0;
    for (; block + kTogether <= tree_.blocks; block += kTogether) scan_products<kQueries, kTogether>(block);
    for (; block < tree_.blocks; ++block) scan_products<kQueries, 1>(block);
}

// ---------------------------------------------------------------------------------------------------------------------
// The query searched by double distances: ranked_ holds the k best (distance, index).

float Searcher::exact_threshold(int q) const {
    if (static_cast<int64_t>(ranked_.size()) < k_) return kNone;
    const double scaled = ranked_.back().first * tree_.scale * tree_.scale;
    return static_cast<float>(scaled * bounds_.widen * (1 + 1e-6)) + slack_[q];
}

// Whether k rows at distance 0 are known, all before `row`: then it and later ones cannot matter.
inline bool Searcher::settled(uint32_t row) const {
    return static_cast<int64_t>(ranked_.size()) == k_ && ranked_.back().first == 0 && row > ranked_.back().second;
}

void Searcher::exact_block(int q, int64_t block) {
    const float* y = rows_.get() + q * dims_;
    const float* x = tree_.coordinates.get() + block * dims_ * kFan;
    Block sum{};
    for (int64_t d = 0; d < dims_; ++d)
        for (int v = 0; v < kVectors; ++v) {
            const Vec difference = load(x + d * kFan + v * kLanes) - broadcast(y[d]);
            sum.part[v] += difference * difference;
        }
    work_ += dims_;
    for (uint32_t mask = not_above(sum, exact_threshold(q)); mask; mask &= mask - 1) {
        const uint32_t row = tree_.row[block * kFan + __builtin_ctz(mask)];
        if (row == self_[q] || row == kNoRow || settled(row)) continue;
        const std::pair<double, uint32_t> found{squared_distance(queries_, query_row_[q], tree_.references, row), row};
        const bool full = static_cast<int64_t>(ranked_.size()) == k_;
        if (full && !(found < ranked_.back())) continue;
        if (full) ranked_.pop_back();
        ranked_.insert(std::upper_bound(ranked_.begin(), ranked_.end(), found), found);
        work_ += dims_;
    }
}

// Children by (distance, lowest index): among equal rows the first k are found first, and then no others are looked at.
void Searcher::exact_visit(int q, int level, int64_t pack) {
    const float* y = rows_.get() + q * dims_;
    const Block distances = box_distances(tree_.levels[level], pack, dims_, y, y, exact_threshold(q));
    work_ += 3 * dims_;
    const uint32_t* min_index = tree_.levels[level].min_index.data() + pack * kFan;
    alignas(64) float distance[kFan];
    for (int v = 0; v < kVectors; ++v) store(distance + v * kLanes, distances.part[v]);
    int order[kFan];
    int n = 0;
    for (uint32_t mask = not_above(distances, exact_threshold(q)); mask; mask &= mask - 1)
        order[n++] = __builtin_ctz(mask);
    std::sort(order, order + n, [&](int a, int b) {
        return distance[a] < distance[b] || (distance[a] == distance[b] && min_index[a] < min_index[b]);
    });
    for (int i = 0; i < n; ++i) {
        const int lane = order[i];
        if (distance[lane] > exact_threshold(q)) break;
        if (settled(min_index[lane])) continue;
        if (level == 0)
            exact_block(q, pack * kFan + lane);
        else
            exact_visit(q, level - 1, pack * kFan + lane);
    }
}

void Searcher::exact(int q) {
    ranked_.clear();
    bounds_ = KnnBounds::differences(dims_);
    slack_[q] = bounds_.slack * norm_[q] + bounds_.floor;
    exact_visit(q, static_cast<int>(tree_.levels.size()) - 1, 0);
}

void Searcher::finish(int64_t* query, double* squared, int64_t* index) {
    for (int q = 0; q < count_; ++q) {
        const int64_t* list = lists_.get() + q * stride_ + 8;
        const float threshold = threshold_[q];
        if (exact_[q] || key_distance(dropped_[q]) <= threshold) {
            exact(q);
        } else {
            ranked_.clear();
            for (int64_t i = 0; i < capacity_ && key_distance(list[i]) <= threshold; ++i) {
                const uint32_t row = tree_.row[key_place(list[i])];
                ranked_.emplace_back(0.0, row);
                __builtin_prefetch(address(tree_.references, row));
            }
            for (auto& [distance, row] : ranked_)
                distance = squared_distance(queries_, query_row_[q], tree_.references, row);
            std::sort(ranked_.begin(), ranked_.end());
        }
        query[q] = query_row_[q];
        for (int64_t i = 0; i < k_; ++i) {
            squared[q * k_ + i] = ranked_[i].first;
            index[q * k_ + i] = ranked_[i].second;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Join

class TreeJoin final : public KnnJoin {
  public:
    TreeJoin(const Tree& tree, const KnnPoints& queries, int64_t k, int64_t self_offset)
        : tree_(tree), queries_(queries), k_(k), self_offset_(self_offset) {
        if (queries.coordinates == tree.references.coordinates)
            group_by_block();
        else
            group_queries();
        if (scans_ = scan_is_cheaper(); scans_) regroup();
    }

    int64_t groups() const override { return static_cast<int64_t>(home_.size()); }
    int64_t rows(int64_t first, int64_t last) const override { return begin_[last] - begin_[first]; }
    bool scans() const override { return scans_; }

    void search(int64_t first, int64_t last, int64_t* query, double* squared, int64_t* index) const override {
        const KnnBounds bounds = scans_ ? KnnBounds::product(queries_.dims) : KnnBounds::differences(queries_.dims);
        const int threads = static_cast<int>(std::clamp<int64_t>((last - first) / 4, 1, num_threads()));
        std::deque<Searcher> searchers;
        for (int member = 0; member < threads; ++member) searchers.emplace_back(tree_, queries_, k_, self_offset_);
        std::atomic<int64_t> next{first};
        Team::run(threads, [&](int member, Team&) {
            Searcher& searcher = searchers[member];
            while (true) {
                const int64_t begin = next.fetch_add(4), end = std::min(last, begin + 4);
                if (begin >= end) return;
                for (int64_t g = begin; g < end; ++g) {
                    const int64_t at = begin_[g] - begin_[first];
                    load(searcher, g, bounds);
                    if (scans_)
                        searcher.scan_all();
                    else
                        searcher.walk_tree();
                    searcher.finish(query + at, squared + at * k_, index + at * k_);
                }
            }
        });
    }

  private:
    void load(Searcher& searcher, int64_t g, const KnnBounds& bounds) const {
        searcher.load_group(order_.data() + begin_[g], static_cast<int>(begin_[g + 1] - begin_[g]), home_[g], bounds);
    }

    void group_by_block() {
        order_.assign(tree_.row.begin(), tree_.row.begin() + queries_.rows);
        for (int64_t block = 0; block < tree_.blocks; ++block) {
            begin_.push_back(block * kFan);
            home_.push_back(static_cast<uint32_t>(block));
        }
        begin_.push_back(queries_.rows);
    }

    // Sorts the queries by the block whose box is nearest, level by level; a group ends where the node of cells
    // changes.
    void group_queries() {
        std::vector<std::pair<uint32_t, uint32_t>> placed(queries_.rows);  // block, query
        const auto place = [&](int64_t i) {
            const float* x = queries_.coordinates + i * queries_.dims;
            int64_t node = 0;
            for (auto level = tree_.levels.rbegin(); level != tree_.levels.rend(); ++level) {
                const Block distances = box_distances(*level, node, queries_.dims, x, x, kNone);
                alignas(64) float distance[kFan];
                for (int v = 0; v < kVectors; ++v) store(distance + v * kLanes, distances.part[v]);
                node = node * kFan + (std::min_element(distance, distance + kFan) - distance);
            }
            placed[i] = {static_cast<uint32_t>(node), static_cast<uint32_t>(i)};
        };
        Team::run(queries_.rows < 4096 ? 1 : num_threads(), [&](int member, Team& team) {
            const Range share = team.share(queries_.rows, member);
            for (int64_t i = share.begin; i < share.end; ++i) place(i);
        });
        std::sort(placed.begin(), placed.end());
        constexpr uint32_t kNode = kFan * kFan;
        order_.resize(queries_.rows);
        for (int64_t i = 0; i < queries_.rows; ++i) {
            order_[i] = placed[i].second;
            if (i == 0 || i - begin_.back() == kFan || placed[i].first / kNode != placed[i - 1].first / kNode) {
                begin_.push_back(i);
                home_.push_back(placed[i].first);
            }
        }
        begin_.push_back(queries_.rows);
    }

    // Larger groups for the scan, which have no place.
    void regroup() {
        begin_.clear();
        for (int64_t i = 0; i < queries_.rows; i += kBatch) begin_.push_back(i);
        home_.assign(begin_.size(), 0);
        begin_.push_back(queries_.rows);
    }

    // Compares the work of the walk for a few groups with that of the scan: a count, the same on every run.
    bool scan_is_cheaper() const {
        const int64_t samples = std::clamp<int64_t>(groups() / 128, 1, 32);
        Searcher searcher(tree_, queries_, k_, self_offset_);
        std::vector<int64_t> query(kFan), index(kFan * k_);
        std::vector<double> squared(kFan * k_);
        int64_t scan = 0;
        for (int64_t i = 0; i < samples; ++i) {
            const int64_t g = (2 * i + 1) * groups() / (2 * samples);
            load(searcher, g, KnnBounds::differences(queries_.dims));
            searcher.walk_tree();
            searcher.finish(query.data(), squared.data(), index.data());
            scan += rows(g, g + 1) * tree_.blocks * queries_.dims;
        }
        return searcher.work() > scan;
    }

    const Tree& tree_;
    const KnnPoints queries_;
    const int64_t k_, self_offset_;
    std::vector<uint32_t> order_;  // queries by place
    std::vector<int64_t> begin_;   // [groups + 1] into order_
    std::vector<uint32_t> home_;   // [groups] block in or next to which a group lies
    bool scans_ = false;
};

class TreeIndex final : public KnnIndex {
  public:
    TreeIndex(const KnnPoints& references, double scale) : tree_(references, scale) {}
    std::unique_ptr<KnnJoin> join(const KnnPoints& queries, int64_t k, int64_t self_offset) const override {
        return std::make_unique<TreeJoin>(tree_, queries, k, self_offset);
    }

  private:
    Tree tree_;
};

}  // namespace

std::unique_ptr<KnnIndex> build_knn_index(const KnnPoints& references, double scale) {
    return std::make_unique<TreeIndex>(references, scale);
}

}  // namespace SDW_ISA
}  // namespace sdw
