// Products of tiled matrices (unrolled_bc_schedule.h) by one warp: sums of left x right-transposed, both operands tiled
// with the summed index along their rows, straight from the caches to registers.
//
// Why no shared memory: in a product of 16 rows every weight is used once a block, by one warp, so that staging it
// would cost a store, a load and a barrier and save nothing. What several warps of a block share (activations, or the
// rows and columns of a weight gradient) the first-level cache holds. Latency is hidden by a ring of loads in
// registers.
#pragma once

#include "mma.h"
#include "unrolled_bc_schedule.h"

namespace sdw::unrolled {

// The operands of a sum of one or two products: chunks of 16 along the summed index, first of terms[0], then terms[1].
struct Term {
    const float* left;
    const float* right;
};
struct Terms {
    Term term[2];
    int count;
    int chunks;  // of each term
};

// Tiles of an operand: rows of 16 on the left, of 8 on the right. Past the end, loads repeat the last.
struct Span {
    int first, count;
    __device__ int at(int i) const { return first + i < count ? first + i : count - 1; }
};

__device__ inline float4 load4(const float* address) { return *reinterpret_cast<const float4*>(address); }

// tf32: per chunk two tensor-core steps of 8. The order along the summed index is free as long as both operands share
// it, so that a lane's four neighbors serve as columns t and t + 4 of both steps.
struct Tf32 {
    struct Left {
        float4 low, high;  // rows 0 to 7 and 8 to 15
    };
    using Right = float4;

    // Of a lane's first number in a tile.
    __device__ static int left_offset(int lane) { return 4 * lane; }
    __device__ static int right_offset(int lane) { return 4 * lane; }

    __device__ static Left left(const float* low, const float* high) { return {load4(low), load4(high)}; }
    template <bool once>
    __device__ static Right right(const float* tile) {
        return once ? __ldcg(reinterpret_cast<const float4*>(tile)) : load4(tile);
    }
    __device__ static float4 round(float4 x) {
        return make_float4(to_tf32(x.x), to_tf32(x.y), to_tf32(x.z), to_tf32(x.w));
    }
    template <int kM, int kN>
    __device__ static void multiply(float (&sum)[kM][kN][4], const Left (&a)[kM], const Right (&b)[kN]) {
        float4 right[kN];
#pragma unroll
        for (int j = 0; j < kN; ++j) right[j] = round(b[j]);
#pragma unroll
        for (int i = 0; i < kM; ++i) {
            const float4 low = round(a[i].low), high = round(a[i].high);
            const float first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
            for (int j = 0; j < kN; ++j) {
                mma_tf32(sum[i][j], first, {right[j].x, right[j].y});
                mma_tf32(sum[i][j], second, {right[j].z, right[j].w});
            }
        }
    }
};

// float32: the same tiles and the same owner of each sum, by multiply-adds in order; loads as it goes.
struct Ieee {
    struct Left {
        const float *low, *high;
    };
    using Right = const float*;

    __device__ static int left_offset(int lane) { return lane / 4 * 16; }
    __device__ static int right_offset(int lane) { return lane % 4 * 32; }

    __device__ static Left left(const float* low, const float* high) { return {low, high}; }
    template <bool>
    __device__ static Right right(const float* tile) {
        return tile;
    }
    __device__ static float dot(float sum, float4 x, float4 y) {
        return fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, sum))));
    }
    template <int kM, int kN>
    __device__ static void multiply(float (&sum)[kM][kN][4], const Left (&a)[kM], const Right (&b)[kN]) {
#pragma unroll
        for (int k = 0; k < 16; k += 4) {
#pragma unroll
            for (int j = 0; j < kN; ++j) {
                const float4 even = load4(b[j] + k), odd = load4(b[j] + 16 + k);
#pragma unroll
                for (int i = 0; i < kM; ++i) {
                    const float4 low = load4(a[i].low + k), high = load4(a[i].high + k);
                    sum[i][j][0] = dot(sum[i][j][0], low, even);
                    sum[i][j][1] = dot(sum[i][j][1], low, odd);
                    sum[i][j][2] = dot(sum[i][j][2], high, even);
                    sum[i][j][3] = dot(sum[i][j][3], high, odd);
                }
            }
        }
    }
};

// sum[i][j] += the product's tile (16 x 8) of rows left.first + i and columns right.first + j. `once`: no other warp of
// the block reads the right operand. A ring of `ahead` chunks is always in flight: about 12 KiB a warp.
template <typename Product, bool once, int kM, int kN>
__device__ void accumulate(float (&sum)[kM][kN][4], const Terms& terms, Span left, Span right, int lane) {
    constexpr int ahead = 24 / (2 * kM + kN);
    // Set, so that no register of an earlier product seems in use until the first load.
    typename Product::Left a[ahead][kM] = {};
    typename Product::Right b[ahead][kN] = {};
    const int chunks = terms.chunks, total = chunks * terms.count, stride = chunks * 128;
    const float* rows = terms.term[0].left + Product::left_offset(lane);
    const float* columns = terms.term[0].right + Product::right_offset(lane);
    int loaded = 0;
    const auto load = [&](int slot) {
        if (loaded == total) return;
#pragma unroll
        for (int i = 0; i < kM; ++i) {
            const float* tile = rows + 2 * left.at(i) * stride;
            a[slot][i] = Product::left(tile, tile + stride);
        }
#pragma unroll
        for (int j = 0; j < kN; ++j) b[slot][j] = Product::template right<once>(columns + right.at(j) * stride);
        rows += 128;
        columns += 128;
        if (++loaded == chunks) {
            rows = terms.term[1].left + Product::left_offset(lane);
            columns = terms.term[1].right + Product::right_offset(lane);
        }
    };
#pragma unroll
    for (int slot = 0; slot < ahead; ++slot) load(slot);
#pragma unroll 1
    for (int first = 0; first < total; first += ahead) {
#pragma unroll
        for (int slot = 0; slot < ahead; ++slot) {
            if (first + slot < total) Product::multiply(sum, a[slot], b[slot]);
            load(slot);
        }
    }
}

// The product's tiles with what surrounds it: fetch(row, column) loads what the epilogue needs before the product
// starts, finish(row, column, x0, x1, fetched) takes the sums of columns `column` and `column` + 1.
template <typename Product, bool once, int kM, int kN, typename Fetch, typename Finish>
__device__ void product_tiles(const Terms& terms, Span left, Span right, int lane, Fetch fetch, Finish finish) {
    using Fetched = decltype(fetch(0, 0));
    Fetched fetched[kM][kN][2];
    float sum[kM][kN][4] = {};
    const int row = lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                fetched[i][j][half] = fetch(left.at(i) * 16 + 8 * half + row, right.at(j) * 8 + column);
    accumulate<Product, once>(sum, terms, left, right, lane);
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (left.first + i < left.count && right.first + j < right.count)
                    finish((left.first + i) * 16 + 8 * half + row, (right.first + j) * 8 + column, sum[i][j][2 * half],
                           sum[i][j][2 * half + 1], fetched[i][j][half]);
}

}  // namespace sdw::unrolled
