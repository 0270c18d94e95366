// Which queries may have a point of a leaf within their limits: 32 queries against 64 points on the tensor core.
//
// ‖x − q‖² = ‖x‖² − 2qx + ‖q‖² over as many of the leading axes as fill whole tiles, which is no more than over all of
// them. In halves a point is its coordinates and in the last place its squared norm; a query is −2q, and 1. A sum that
// starts at ‖q‖² − T is then negative where the point lies within T, and what 64 points have to say are a few "or"s of
// signs.
//
// T for a limit d² on the distance as it was before rounding: coordinates are kKnnHalf times theirs, rounded to 11 bits
// (or by 2^-25, where halves run out of exponents), which moves the two points by at most A = 2^-11 (2‖q‖ + d) and
// something absolute, so that the distance becomes at most d + A. The norm is that of the rounded coordinates, rounded
// itself: 2^-11 (‖q‖ + d)². Sums are float; of 17 terms a tile, each below (2‖q‖ + d)², the tensor core cuts off at
// most 2^-23 of the largest.
#pragma once

#include "knn_common.h"
#include "mma.h"

namespace sdw {
namespace {

// Tiles of 16 numbers along the axes for points of V float4s: nearly all axes, and the norm.
SDW_HOST_DEVICE constexpr int filter_tiles(int V) { return V < 6 ? 1 : (V + 2) / 4; }

template <int V>
struct Filter {
    static constexpr int kTiles = filter_tiles(V);

    unsigned sharp = 0;              // queries whose T is hardly more than their limit
    unsigned queries[2][kTiles][4];  // 16 each, as mma_half takes them
    float start[2][4];
    float square = 0;  // ‖q‖² of this lane's query, in halves

    // float4 i of a query in halves.
    __device__ static uint2 halves(const float4* row, int i) {
        const float4 x = i < V ? row[i] : make_float4(0, 0, 0, 0);
        constexpr float scale = -2 * kKnnHalf;
        return make_uint2(pack_halves(scale * x.x, scale * x.y),
                          pack_halves(scale * x.z, i == 4 * kTiles - 1 ? 1 : scale * x.w));
    }

    // rows: of the 32 queries, `stride` float4s apart.
    __device__ void load(const float4* rows, int stride, int lane) {
        for (int i = 0; i < 4 * kTiles; ++i) {
            const uint2 x = halves(rows + lane * stride, i);
            const float2 low = unpack_halves(x.x), high = unpack_halves(x.y);
            square += (low.x * low.x + low.y * low.y + high.x * high.x) / 4;
            if (i < 4 * kTiles - 1) square += high.y * high.y / 4;
        }
#pragma unroll
        for (int i = 0; i < 4 * kTiles; ++i) {  // halves 16 (i / 2), rows g and g + 8 of each
            const int half = i % 2, tile = i / 4, below = i / 2 % 2;
            const uint2 x = halves(rows + (16 * half + 8 * below + lane / 4) * stride, 4 * tile + lane % 4);
            queries[half][tile][below] = x.x;
            queries[half][tile][2 + below] = x.y;
        }
    }

    // limit: of this lane's query; negative: there is none.
    __device__ void update(float limit, int lane) {
        const float d = sqrtf(fmaxf(limit, 0)) * kKnnHalf * (1 + 0x1p-17f), norm = sqrtf(square), sum = 2 * norm + d;
        const float moved = d + 1.01f * 0x1p-11f * sum + 0x1p-20f, norms = 1.01f * 0x1p-11f * (norm + d) * (norm + d);
        const float within = moved * moved + norms + kTiles * 0x1p-17f * sum * sum + 0x1p-24f;
        sharp = __ballot_sync(kAll, limit >= 0 && limit < kNone && within <= 1.5f * d * d);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // Twice, or the compiler keeps one and copies it in front of every product.
            start[i / 2][2 * (i % 2)] = __shfl_sync(kAll, square - within, 8 * i + lane / 4);
            start[i / 2][2 * (i % 2) + 1] = __shfl_sync(kAll, square - within, 8 * i + lane / 4);
        }
    }

    // points: the leaf's in halves.
    __device__ unsigned near(const uint4* points, int lane) const {
        int signs[4] = {};  // of the queries 8i + lane / 4
#pragma unroll
        for (int pair = 0; pair < kKnnLeaf / 16; ++pair) {
            uint4 x[kTiles];
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) x[tile] = __ldg(points + (pair * kTiles + tile) * kLanes + lane);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int half = i % 2;
                float sum[4];
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
                    const uint2 y = i < 2 ? make_uint2(x[tile].x, x[tile].y) : make_uint2(x[tile].z, x[tile].w);
                    if (tile == 0)
                        mma_half(sum, queries[half][tile], y, start[half]);
                    else
                        mma_half(sum, queries[half][tile], y, sum);
                }
                signs[2 * half] |= __float_as_int(sum[0]) | __float_as_int(sum[1]);
                signs[2 * half + 1] |= __float_as_int(sum[2]) | __float_as_int(sum[3]);
            }
        }
        if (!__any_sync(kAll, (signs[0] | signs[1] | signs[2] | signs[3]) < 0)) return 0;
        unsigned mine = 0;  // the four lanes that have summed for this lane's query
        for (int i = 0; i < 4; ++i) {
            const unsigned votes = __ballot_sync(kAll, signs[i] < 0);
            if (lane / 8 == i) mine = votes >> (lane % 8 * 4) & 15u;
        }
        return __ballot_sync(kAll, mine != 0);
    }
};

}  // namespace
}  // namespace sdw
