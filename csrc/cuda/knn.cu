// Exact k nearest neighbors by a join of leaves, pruned by proof.
//
// The references lie in leaves of 64 points of a balanced kd-tree on the principal axes, 32 leaves a cell. A warp
// answers a group of 32 queries that are neighbors in such a tree themselves, and changes its view of its lanes as it
// goes down:
//
//     cells     a lane is a cell      its box against the group's box; near cells first, in shells of growing radius
//     leaves    a lane is a leaf      the boxes of a cell's leaves against the group's box
//     queries   all pairs of 32 queries and 64 points on the tensor core, by the leading axes (knn_filter.h), or, as
//               long as limits are wider or narrower than halves resolve, the leaf's box against a query a lane
//     points    a lane is two points  the leaf, in registers, against each query that wants it, read as a broadcast
//
// In eleven effective dimensions a box keeps little out: of 10⁶ points a query is within reach of an eighth of all
// leaves, a group of nearly all of them, whatever the order. So what counts is the price of a leaf, which is the
// filter's: a point and a query cost half an instruction there and two in `scan`. The warps of a block take the same
// cells at the same time, and a leaf is in the first-level cache for all but one of them. Cells and leaves are visited
// in the order of place ^ home, the nearest in the tree first, so that limits are tight early.
//
// A lane whose distance beats the query's limit is rare (about k log N times a query); the warp then inserts its key
// into the query's sorted list, 32 places of which it moves at once. There is no matrix of distances.
//
// Exactness is the CPU's (csrc/cpu/knn, sdw/knn_bounds.h): float distances of centered coordinates only filter.
// With τ the k-th smallest of them every point up to T(τ) is kept, in a list with room for more than k, and `finish`
// ranks the list in double by the points as given, ties by row. If the list ran full within T, the query is searched
// again, ranked in double from the start. Both ways the answer depends neither on the order of the visits nor on
// pruning.
#include <cmath>

#include "knn_common.h"
#include "knn_filter.h"
#include "knn_finish.h"

namespace sdw {
namespace {

constexpr int kSearchWarps = 8;   // of a block: groups that share what they read
constexpr int kSearchBlocks = 2;  // a multiprocessor, that is up to 128 registers a thread: three spill, and lose
constexpr int kShells = 8;        // squared radii in which cells are visited, as fractions of the block's reach
constexpr int kFilterFrom = 3;    // queries that want a leaf: fewer are cheaper scanned
constexpr uint64_t kNoKey = ~uint64_t{0} >> 1;

// Room beyond k for what lies within the rounding bound of the k-th neighbor.
SDW_HOST_DEVICE inline int64_t list_capacity(int64_t k) { return (k + 5 + k / 8 + 7) / 8 * 8; }

// ---------------------------------------------------------------------------------------------------------------------
// The search by float distances: one warp, one group.

template <int V>
struct Searcher {
    static constexpr int kStride = V | 1;             // float4s from one query to the next: lanes meet no bank twice
    static constexpr int kTogether = V <= 4 ? 2 : 1;  // points of a leaf that a lane holds in registers
    static constexpr int kShared =
        kSearchWarps * (kLanes * kStride + 2 * V) + 2 * V + (kSearchWarps + 3) / 4;  // float4s

    const Search& s;
    const int warp, lane;
    float4* const shared;
    float4* const box;    // of the group: V float4s low, V high
    float4* const rows;   // of the group: the queries
    const int64_t begin;  // of the group, in the call
    const int64_t home;   // leaf in or next to which the block's queries lie, if they are the references
    uint64_t* const lists;
    Filter<V> filter;
    unsigned real = 0;  // lanes that have a query
    // Of the query that is this lane's:
    float limit = -1;  // points at or beyond it are of no use; negative: there is no query
    float slack = 0;
    int64_t self = -1;
    int tested = 0, scanned = 0;

    __device__ Searcher(const Search& search, float4* shared_)
        : s(search),
          warp(static_cast<int>(threadIdx.x) / kLanes),
          lane(static_cast<int>(threadIdx.x) % kLanes),
          shared(shared_),
          box(shared + (1 + warp) * 2 * V),
          rows(shared + (1 + kSearchWarps) * 2 * V + warp * kLanes * kStride),
          begin((static_cast<int64_t>(blockIdx.x) * kSearchWarps + warp) * kLanes),
          home((s.p.first + (begin - warp * kLanes)) * s.p.leaves / s.p.queries.rows),
          lists(search.lists + begin * search.capacity) {}

    __device__ void load() {
        const int64_t left = s.p.rows - begin;
        const int count = left <= 0 ? 0 : left < kLanes ? static_cast<int>(left) : kLanes;
        const float4* from = reinterpret_cast<const float4*>(s.p.queries.coordinates) + s.p.first * V;
        // Lanes beyond the last query repeat it and want nothing.
        for (int i = lane; i < kLanes * V; i += kLanes)
            rows[i / V * kStride + i % V] = __ldg(from + min(begin + i / V, s.p.rows - 1) * V + i % V);
        __syncwarp();
        for (int d = lane; d < 4 * V; d += kLanes) reduce(rows, kStride, kLanes, 0, box, d);
        for (int i = lane; i < count * s.capacity; i += kLanes) lists[i] = make_key(kNone, ~uint32_t{0});
        if (lane < count) {
            limit = kNone;
            self = s.p.query_row[s.p.first + begin + lane] + s.p.self_offset;
            float norm = 0;
            for (int i = 0; i < V; ++i) norm = add_squares(norm, rows[lane * kStride + i]);
            slack = s.bounds.slack * norm + s.bounds.floor;
        }
        real = __ballot_sync(kAll, lane < count);
        filter.load(rows, kStride, lane);
        filter.update(limit, lane);
        __syncthreads();
        const int threads = kSearchWarps * kLanes;
        for (int d = static_cast<int>(threadIdx.x); d < 4 * V; d += threads)
            reduce(shared + 2 * V, 2 * V, kSearchWarps, V, shared, d);
        __syncthreads();
    }

    // Coordinate d of the box around `count` boxes, `stride` float4s apart, whose high ends lie `high` behind the low.
    __device__ static void reduce(const float4* from, int stride, int count, int high, float4* to, int d) {
        const float *lows = reinterpret_cast<const float*>(from) + d, *highs = lows + 4 * high;
        float least = lows[0], most = highs[0];
        for (int i = 1; i < count; ++i) {
            least = fminf(least, lows[i * 4 * stride]);
            most = fmaxf(most, highs[i * 4 * stride]);
        }
        reinterpret_cast<float*>(to)[d] = least;
        reinterpret_cast<float*>(to + V)[d] = most;
    }

    // What the neediest query of the group can still use.
    __device__ float reach() const {
        const float largest = warp_max(limit);
        return s.p.prune || largest < 0 ? largest : kNone;
    }

    // The same of the block; all its warps call.
    __device__ float block_reach() const {
        float* reaches = reinterpret_cast<float*>(shared + Searcher::kShared - (kSearchWarps + 3) / 4);
        const float own = reach();
        if (lane == 0) reaches[warp] = own;
        __syncthreads();
        const float largest = warp_max(reaches[lane % kSearchWarps]);
        __syncthreads();
        return largest;
    }

    // Cells in shells of growing distance from the block; every shell also finds where the next one begins.
    __device__ void walk() {
        float done = -1, next = -1;
        for (int shell = 0;; ++shell) {
            const float within = block_reach();
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
        const int64_t home_pack = home / kKnnFan / kKnnFan;
        const int order = static_cast<int>(home / kKnnFan % kKnnFan);
        float beyond = INFINITY;
        int64_t packs = 1;
        while (packs < s.packs) packs *= 2;
        for (int64_t i = 0; i < packs; ++i) {
            const int64_t pack = i ^ home_pack;
            if (pack >= s.packs) continue;
            const float4* boxes = pack_at(s.p.cell_boxes, pack, V);
            const float distance = box_distance(shared, shared + V, boxes, lane ^ order, V);
            if (distance > bound) beyond = fminf(beyond, distance);
            unsigned mask = __ballot_sync(kAll, distance > done && distance <= bound);
            if (mask == 0) continue;
            const float own_distance = box_distance(box, box + V, boxes, lane ^ order, V);
            for (; mask; mask &= mask - 1) {
                const int next = lowest_lane(mask);
                __syncthreads();  // to meet in the cache
                if (__shfl_sync(kAll, own_distance, next) < reach()) visit_cell(pack * kKnnFan + (next ^ order));
            }
        }
        return warp_min(beyond);
    }

    // The leaves of a cell, those that touch the group's box first.
    __device__ void visit_cell(int64_t cell) {
        const float4* boxes = pack_at(s.p.leaf_boxes, cell, V);
        const int order = static_cast<int>(home % kKnnFan);
        const float distance = box_distance(box, box + V, boxes, lane ^ order, V);
        const unsigned touching = __ballot_sync(kAll, distance == 0);
        for (unsigned mask = __ballot_sync(kAll, distance < reach()); mask;) {
            const int next = lowest_lane(mask & touching ? mask & touching : mask);
            mask &= ~(1u << next);
            if (visit_leaf(cell, boxes, next ^ order)) mask &= __ballot_sync(kAll, distance < reach());
        }
    }

    // Returns whether any limit has changed.
    __device__ bool visit_leaf(int64_t cell, const float4* boxes, int number) {
        const int64_t leaf = cell * kKnnFan + number;
        const unsigned wants = wanting(leaf, boxes, number);
        ++tested;
        if (wants == 0) return false;
        scanned += __popc(wants);
        const float before = limit;
        for (int half = 0; half < 2; half += kTogether) scan(leaf, half * kLanes, wants);
        if (!__any_sync(kAll, limit != before)) return false;
        filter.update(limit, lane);
        return true;
    }

    __device__ unsigned wanting(int64_t leaf, const float4* boxes, int number) const {
        unsigned wants = real;
        if (!s.p.prune) return wants;
        if (wants & ~filter.sharp) {
            const float4* row = rows + lane * kStride;
            wants = __ballot_sync(kAll, box_distance(row, row, boxes, number, V) < limit);
        }
        if (__popc(wants & filter.sharp) < kFilterFrom) return wants;
        const uint4* points = reinterpret_cast<const uint4*>(s.p.halves) + leaf * (kKnnLeaf * 2 * Filter<V>::kTiles);
        return wants & (filter.near(points, lane) | ~filter.sharp);
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

    __device__ void write() {
        if (real == 0) return;
        const bool asked = limit >= 0;
        const uint64_t* list = lists + lane * s.capacity;
        const float final_threshold = asked ? threshold(list) : 0;
        if (asked) s.thresholds[begin + lane] = final_threshold;
        const unsigned again = __ballot_sync(kAll, asked && key_distance(list[s.capacity - 1]) <= final_threshold);
        if (lane != 0) return;
        int32_t* counts = s.p.counts + begin / kLanes * 3;
        counts[0] = tested;
        counts[1] = scanned;
        counts[2] = __popc(again);
    }
};

template <int V>
__global__ void __launch_bounds__(kSearchWarps* kLanes, kSearchBlocks) search(Search s) {
    Searcher<V> searcher(s, reinterpret_cast<float4*>(shared_memory()));
    searcher.load();
    searcher.walk();
    searcher.write();
}

// ---------------------------------------------------------------------------------------------------------------------

unsigned blocks_for(int64_t items, int64_t per_block) {
    return static_cast<unsigned>((items + per_block - 1) / per_block);
}

template <int V>
void launch_search(const Search& s, void* stream) {
    const int64_t groups = (s.p.rows + kLanes - 1) / kLanes;
    launch(search<V>, blocks_for(groups, kSearchWarps), kSearchWarps * kLanes, Searcher<V>::kShared * sizeof(float4),
           stream, s);
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

int64_t knn_cuda_filter_width(int64_t dims) {
    const Compiled* compiled = compiled_for(dims);
    return compiled == nullptr ? 0 : 16 * filter_tiles(compiled->V);
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
