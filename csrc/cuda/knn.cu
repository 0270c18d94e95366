// Exact k nearest neighbors by a join of leaves, pruned by proof.
//
// The references lie in leaves of 64 points of a balanced kd-tree on the principal axes, 32 leaves a cell. A warp
// answers a group of 32 queries that are neighbors in such a tree themselves, and changes its view of its lanes as it
// goes down:
//
//     cells     a lane is a cell      its box against the group's box; near cells first, in shells of growing radius
//     leaves    a lane is a leaf      the boxes of a cell's leaves against the group's box; the nearest first
//     queries   a lane is a query     a leaf's box against each query: which of them want the leaf?
//     points    a lane is two points  the leaf, in registers, against each query that wants it, read as a broadcast
//
// so that every query prunes by its own k-th distance while all memory is read in full lines, and a leaf is read once
// for all queries that want it. Per query and leaf of V = W/4 float4: V broadcast loads from shared memory (or as many
// cycles of its bandwidth as the arithmetic takes), 4W subtractions and multiply-adds of the warp, a ballot. A lane
// whose distance beats the query's limit is rare (about k log N times a query); the warp then inserts its key into the
// query's sorted list, 32 places of which it moves at once. There is no matrix of distances, and nothing is shared
// between warps but the leaves, which neighbors find in the first-level cache.
//
// Exactness is the CPU's (csrc/cpu/knn, sdw/knn_bounds.h): float distances of centered coordinates only filter.
// With τ the k-th smallest of them every point up to T(τ) is kept, in a list with room for more than k, and `finish`
// ranks the list in double by the points as given, ties by row. If the list ran full within T, the query is searched
// again, ranked in double from the start. Both ways the answer depends neither on the order of the visits nor on
// pruning.
#include <cfloat>
#include <cmath>
#include <stdexcept>
#include <string>

#include "launch.h"
#include "sdw/knn.h"
#include "sdw/knn_bounds.h"

namespace sdw {
namespace {

constexpr int kLanes = 32;
constexpr int kSearchWarps = 2;   // of a block: the two halves of a leaf in a self-join, which want the same leaves
constexpr int kSearchBlocks = 8;  // a multiprocessor, that is up to 128 registers a thread; a guess, not measured
constexpr int kFinishWarps = 4;
constexpr int kShells = 8;  // squared radii in which cells are visited, as fractions of the group's reach
constexpr unsigned kAll = 0xffffffffu;
constexpr float kNone = FLT_MAX;  // the limit of a query that has not found k points yet
constexpr uint64_t kNoKey = ~uint64_t{0} >> 1;

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

// Room beyond k for what lies within the rounding bound of the k-th neighbor.
SDW_HOST_DEVICE inline int64_t list_capacity(int64_t k) { return (k + 5 + k / 8 + 7) / 8 * 8; }

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
#pragma unroll
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

// ---------------------------------------------------------------------------------------------------------------------
// The search by float distances: one warp, one group.

template <int V>
struct Searcher {
    static constexpr int kStride = V | 1;             // float4s from one query to the next: lanes meet no bank twice
    static constexpr int kTogether = V <= 8 ? 2 : 1;  // points of a leaf that a lane holds in registers
    static constexpr int kShared = kLanes * kStride + 2 * V;  // float4s

    const Search& s;
    const int lane;
    float4* const rows;  // shared: the queries
    float4* const low;   // shared: the group's box
    float4* const high;
    uint64_t* const lists;
    // Of the query that is this lane's:
    float limit = -1;  // points at or beyond it are of no use; negative: there is no query
    float slack = 0;
    int64_t self = -1;
    int tested = 0, scanned = 0;

    __device__ Searcher(const Search& search, int64_t group, float4* shared)
        : s(search),
          lane(static_cast<int>(threadIdx.x) % kLanes),
          rows(shared),
          low(shared + kLanes * kStride),
          high(low + V),
          lists(search.lists + group * kLanes * search.capacity) {}

    __device__ void load(int64_t group) {
        const int64_t begin = group * kLanes, left = s.p.rows - begin;
        const int count = left < kLanes ? static_cast<int>(left) : kLanes;
        const float4* from = reinterpret_cast<const float4*>(s.p.queries.coordinates) + (s.p.first + begin) * V;
        // Lanes beyond the last query repeat it and want nothing.
        for (int i = lane; i < kLanes * V; i += kLanes)
            rows[i / V * kStride + i % V] = __ldg(from + min(i / V, count - 1) * V + i % V);
        __syncwarp();
        for (int d = lane; d < 4 * V; d += kLanes) {
            const float* column = reinterpret_cast<const float*>(rows) + d;
            float least = column[0], most = column[0];
            for (int q = 1; q < count; ++q) {
                least = fminf(least, column[q * 4 * kStride]);
                most = fmaxf(most, column[q * 4 * kStride]);
            }
            reinterpret_cast<float*>(low)[d] = least;
            reinterpret_cast<float*>(high)[d] = most;
        }
        for (int i = lane; i < count * s.capacity; i += kLanes) lists[i] = make_key(kNone, ~uint32_t{0});
        if (lane < count) {
            limit = kNone;
            self = s.p.query_row[s.p.first + begin + lane] + s.p.self_offset;
            float norm = 0;
            for (int i = 0; i < V; ++i) norm = add_squares(norm, rows[lane * kStride + i]);
            slack = s.bounds.slack * norm + s.bounds.floor;
        }
        __syncwarp();
    }

    // What the neediest query of the group can still use.
    __device__ float reach() const {
        const float largest = warp_max(limit);
        return s.p.prune || largest < 0 ? largest : kNone;
    }

    // Cells in shells of growing distance; every shell also finds where the next one begins.
    __device__ void walk() {
        float done = -1, next = -1;
        for (int shell = 0;; ++shell) {
            const float within = reach();
            if (!(next < within)) return;
            float bound = next;  // the nearest cells alone, as long as some query knows no k points
            if (shell > 0 && within < kNone) bound = fmaxf(next, within * static_cast<float>(shell) / kShells);
            if (shell > 0 && !s.p.prune) bound = kNone;
            next = visit_cells(done, bound);
            done = bound;
        }
    }

    // Visits the cells with done < distance <= bound; returns the least distance beyond.
    __device__ float visit_cells(float done, float bound) {
        float beyond = INFINITY;
        for (int64_t pack = 0; pack < s.packs; ++pack) {
            const float distance = box_distance(low, high, pack_at(s.p.cell_boxes, pack, V), lane, V);
            if (distance > bound) beyond = fminf(beyond, distance);
            for (unsigned mask = __ballot_sync(kAll, distance > done && distance <= bound); mask; mask &= mask - 1) {
                const int cell = lowest_lane(mask);
                if (__shfl_sync(kAll, distance, cell) < reach()) visit_cell(pack * kKnnFan + cell);
            }
        }
        return warp_min(beyond);
    }

    // The leaves of a cell, the nearest first.
    __device__ void visit_cell(int64_t cell) {
        const float4* boxes = pack_at(s.p.leaf_boxes, cell, V);
        float distance = box_distance(low, high, boxes, lane, V), within = reach();
        for (;;) {
            const float nearest = warp_min(distance);
            if (!(nearest < within)) return;
            const int leaf = lowest_lane(__ballot_sync(kAll, distance == nearest));
            if (lane == leaf) distance = INFINITY;
            if (visit_leaf(cell * kKnnFan + leaf, boxes, leaf)) within = reach();
        }
    }

    // Returns whether any query wanted the leaf.
    __device__ bool visit_leaf(int64_t leaf, const float4* boxes, int box) {
        const float4* row = rows + lane * kStride;
        const float distance = box_distance(row, row, boxes, box, V);
        const unsigned wants = __ballot_sync(kAll, s.p.prune ? distance < limit : limit >= 0);
        ++tested;
        scanned += __popc(wants);
        for (int half = 0; half < 2 && wants; half += kTogether) scan(leaf, half * kLanes, wants);
        return wants != 0;
    }

    // The points of a leaf from `offset` on, kTogether a lane, against each query that wants them.
    __device__ void scan(int64_t leaf, int offset, unsigned wants) {
        const float4* points = leaf_at(s.p.references.coordinates, leaf, V) + offset + lane;
        const auto place = static_cast<uint32_t>(leaf * kKnnLeaf + offset + lane);
        float4 x[kTogether][V];
#pragma unroll
        for (int i = 0; i < kTogether * V; ++i) x[i / V][i % V] = __ldg(points + i % V * kKnnLeaf + i / V * kLanes);
        for (; wants; wants &= wants - 1) {
            const int query = lowest_lane(wants);
            float squared[kTogether] = {};
#pragma unroll
            for (int i = 0; i < V; ++i) {
                const float4 y = rows[query * kStride + i];
#pragma unroll
                for (int c = 0; c < kTogether; ++c) squared[c] = add_squares(squared[c], minus(x[c][i], y));
            }
            const float least = __shfl_sync(kAll, limit, query);
#pragma unroll
            for (int c = 0; c < kTogether; ++c)
                insert_better(query, squared[c], squared[c] < least, place + static_cast<uint32_t>(c) * kLanes);
        }
    }

    // Lanes with `better` have a point for the query: inserts those that still are, one after the other.
    __device__ void insert_better(int query, float squared, bool better, uint32_t place) {
        unsigned mask = __ballot_sync(kAll, better);
        if (mask == 0) return;
        const int64_t left_out = __shfl_sync(kAll, self, query);
        mask = __ballot_sync(kAll, better && s.p.row[place] != left_out);
        for (; mask; mask &= mask - 1) {
            const uint64_t key = __shfl_sync(kAll, make_key(squared, place), lowest_lane(mask));
            if (key_distance(key) < __shfl_sync(kAll, limit, query)) insert(query, key);
        }
    }

    // Into the sorted list, 32 places at once: list'[i] = min(list[i], max(list[i - 1], key)).
    __device__ void insert(int query, uint64_t key) {
        uint64_t* list = lists + query * s.capacity;
        for (int at = (s.capacity - 1) / kLanes * kLanes; at >= 0; at -= kLanes) {
            const int i = at + lane;
            const uint64_t here = i < s.capacity ? list[i] : kNoKey;
            const uint64_t before = i > 0 && i < s.capacity ? list[i - 1] : 0;
            __syncwarp();
            if (i < s.capacity) list[i] = min(here, max(before, key));
            __syncwarp();
        }
        // Beyond T nothing is needed; beyond the end of the list it would be dropped, and the query searched again.
        if (lane == query) limit = fminf(threshold(list), key_distance(list[s.capacity - 1]));
    }

    __device__ float threshold(const uint64_t* list) const {
        return s.bounds.widen * key_distance(list[s.p.k - 1]) + slack;
    }

    __device__ void write(int64_t group) {
        const bool real = limit >= 0;
        const uint64_t* list = lists + lane * s.capacity;
        const float final_threshold = real ? threshold(list) : 0;
        if (real) s.thresholds[group * kLanes + lane] = final_threshold;
        const unsigned again = __ballot_sync(kAll, real && key_distance(list[s.capacity - 1]) <= final_threshold);
        if (lane != 0) return;
        s.p.counts[group * 3] = tested;
        s.p.counts[group * 3 + 1] = scanned;
        s.p.counts[group * 3 + 2] = __popc(again);
    }
};

template <int V>
__global__ void __launch_bounds__(kSearchWarps* kLanes, kSearchBlocks) search(Search s) {
    const int warp = static_cast<int>(threadIdx.x) / kLanes;
    const int64_t group = static_cast<int64_t>(blockIdx.x) * kSearchWarps + warp;
    if (group * kLanes >= s.p.rows) return;
    Searcher<V> searcher(s, group, reinterpret_cast<float4*>(shared_memory()) + warp * Searcher<V>::kShared);
    searcher.load(group);
    searcher.walk();
    searcher.write(group);
}

// ---------------------------------------------------------------------------------------------------------------------
// The answer: one warp, one query.

// Whether (a, row_a) comes before (b, row_b).
__device__ inline bool before(double a, int64_t row_a, double b, int64_t row_b) {
    return a < b || (a == b && row_a < row_b);
}

struct Finisher {
    const Search& s;
    const int lane;
    const int64_t query;  // of this call
    const int64_t query_row;
    const uint64_t* const list;
    const float threshold;
    double* const squared;
    int64_t* const index;

    __device__ Finisher(const Search& search, int64_t query_)
        : s(search),
          lane(static_cast<int>(threadIdx.x) % kLanes),
          query(query_),
          query_row(search.p.query_row[search.p.first + query_]),
          list(search.lists + query_ * search.capacity),
          threshold(search.thresholds[query_]),
          squared(search.p.squared + query_ * search.p.k),
          index(search.p.index + query_ * search.p.k) {}

    __device__ bool overflowed() const { return key_distance(list[s.capacity - 1]) <= threshold; }

    // Every point of the list up to T finds its own place by counting those before it.
    __device__ void rank(double* distances, int64_t* rows) {
        int count = 0;
        for (int at = 0; at < s.capacity; at += kLanes) {
            const int i = at + lane;
            const bool wanted = i < s.capacity && key_distance(list[i]) <= threshold;
            if (wanted) {
                rows[i] = s.p.row[key_place(list[i])];
                distances[i] = true_distance(s.p, query_row, rows[i]);
            }
            count += __popc(__ballot_sync(kAll, wanted));
        }
        __syncwarp();
        for (int i = lane; i < count; i += kLanes) {
            int place = 0;
            for (int j = 0; j < count; ++j) place += before(distances[j], rows[j], distances[i], rows[i]);
            if (place >= s.p.k) continue;
            squared[place] = distances[i];
            index[place] = rows[i];
        }
    }

    // All points within T, ranked in double as they come; the outputs are the sorted list. T is final here, so that no
    // order of visits is better than another.
    __device__ void search_again() {
        const int V = s.V;
        const float4* x = reinterpret_cast<const float4*>(s.p.queries.coordinates) + (s.p.first + query) * V;
        for (int64_t i = lane; i < s.p.k; i += kLanes) squared[i] = INFINITY, index[i] = -1;
        __syncwarp();
        for (int64_t pack = 0; pack < s.packs; ++pack) {
            const float cell_distance = box_distance(x, x, pack_at(s.p.cell_boxes, pack, V), lane, V);
            for (unsigned cells = __ballot_sync(kAll, cell_distance <= threshold); cells; cells &= cells - 1) {
                const int64_t cell = pack * kKnnFan + lowest_lane(cells);
                const float distance = box_distance(x, x, pack_at(s.p.leaf_boxes, cell, V), lane, V);
                for (unsigned leaves = __ballot_sync(kAll, distance <= threshold); leaves; leaves &= leaves - 1)
                    scan_again(cell * kKnnFan + lowest_lane(leaves), x);
            }
        }
    }

    __device__ void scan_again(int64_t leaf, const float4* x) {
        const double kth = squared[s.p.k - 1];
        const int64_t kth_row = index[s.p.k - 1];
        if (kth == 0 && s.p.first_row[leaf] > kth_row) return;  // k equal rows of lower index are known
        for (int offset = 0; offset < kKnnLeaf; offset += kLanes) {
            const float4* point = leaf_at(s.p.references.coordinates, leaf, s.V) + offset + lane;
            float filter = 0;
            for (int i = 0; i < s.V; ++i)
                filter = add_squares(filter, minus(__ldg(point + i * kKnnLeaf), __ldg(x + i)));
            const int64_t row = s.p.row[leaf * kKnnLeaf + offset + lane];
            const bool candidate = filter <= threshold && row != query_row + s.p.self_offset;
            const double distance = candidate ? true_distance(s.p, query_row, row) : INFINITY;
            for (unsigned mask = __ballot_sync(kAll, before(distance, row, kth, kth_row)); mask; mask &= mask - 1) {
                const int source = lowest_lane(mask);
                insert(__shfl_sync(kAll, distance, source), __shfl_sync(kAll, row, source));
            }
        }
    }

    // As Searcher::insert, with pairs for keys.
    __device__ void insert(double distance, int64_t row) {
        for (int64_t at = (s.p.k - 1) / kLanes * kLanes; at >= 0; at -= kLanes) {
            const int64_t i = at + lane;
            double new_distance = distance;
            int64_t new_row = row;
            if (i > 0 && i < s.p.k && before(distance, row, squared[i - 1], index[i - 1])) {
                new_distance = squared[i - 1];
                new_row = index[i - 1];
            }
            const bool moves = i < s.p.k && before(new_distance, new_row, squared[i], index[i]);
            __syncwarp();
            if (moves) squared[i] = new_distance, index[i] = new_row;
            __syncwarp();
        }
    }
};

__global__ void __launch_bounds__(kFinishWarps* kLanes) finish(Search s) {
    const int warp = static_cast<int>(threadIdx.x) / kLanes;
    const int64_t query = static_cast<int64_t>(blockIdx.x) * kFinishWarps + warp;
    if (query >= s.p.rows) return;
    auto* distances = reinterpret_cast<double*>(shared_memory()) + warp * s.capacity;
    auto* rows = reinterpret_cast<int64_t*>(shared_memory()) + (kFinishWarps + warp) * s.capacity;
    Finisher finisher(s, query);
    if (finisher.overflowed())
        finisher.search_again();
    else
        finisher.rank(distances, rows);
}

// ---------------------------------------------------------------------------------------------------------------------

unsigned blocks_for(int64_t items, int64_t per_block) {
    return static_cast<unsigned>((items + per_block - 1) / per_block);
}

template <int V>
void launch_search(const Search& s, void* stream) {
    const int64_t groups = (s.p.rows + kLanes - 1) / kLanes;
    launch(search<V>, blocks_for(groups, kSearchWarps), kSearchWarps * kLanes,
           kSearchWarps * Searcher<V>::kShared * sizeof(float4), stream, s);
}

// The kernels that are compiled, by float4s a point.
struct Compiled {
    int V;
    void (*launch_search)(const Search& s, void* stream);
};
constexpr Compiled kCompiled[] = {{1, launch_search<1>}, {2, launch_search<2>},   {3, launch_search<3>},
                                  {4, launch_search<4>}, {5, launch_search<5>},   {6, launch_search<6>},
                                  {8, launch_search<8>}, {12, launch_search<12>}, {16, launch_search<16>}};

const Compiled* compiled_for(int64_t dims) {
    for (const Compiled& compiled : kCompiled)
        if (dims <= 4 * compiled.V) return &compiled;
    return nullptr;
}

}  // namespace

int64_t knn_cuda_width(int64_t dims) {
    const Compiled* compiled = compiled_for(dims);
    return compiled == nullptr ? 0 : 4 * compiled->V;
}

size_t knn_cuda_workspace(int64_t rows, int64_t k) {
    return static_cast<size_t>(
        rows * (list_capacity(k) * static_cast<int64_t>(sizeof(uint64_t)) + static_cast<int64_t>(sizeof(float))));
}

void knn_cuda(const KnnParams& params, void* stream) {
    const Compiled* compiled = compiled_for(params.references.dims);
    const int64_t capacity = list_capacity(params.k), cells = (params.leaves + kKnnFan - 1) / kKnnFan;
    auto* lists = static_cast<uint64_t*>(params.workspace);
    const Search s{params,
                   KnnBounds::differences(params.references.dims),
                   compiled->V,
                   (cells + kKnnFan - 1) / kKnnFan,
                   static_cast<int>(capacity),
                   lists,
                   reinterpret_cast<float*>(lists + params.rows * capacity)};
    compiled->launch_search(s, stream);
    launch(finish, blocks_for(params.rows, kFinishWarps), kFinishWarps * kLanes,
           kFinishWarps * static_cast<size_t>(capacity) * (sizeof(double) + sizeof(int64_t)), stream, s);
}

}  // namespace sdw
