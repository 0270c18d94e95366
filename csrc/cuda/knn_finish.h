// The answer of knn, in double: one warp, one query.
//
// Ranks the list that the search has left; or, where that ran full within T, all points within T as they come.
#pragma once

#include <cmath>

#include "knn_common.h"

namespace sdw {
namespace {

constexpr int kFinishWarps = 4;

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

}  // namespace
}  // namespace sdw
