// Products of tiled matrices (unrolled_bc_schedule.h) by one block: sums of left x right-transposed, both operands
// tiled with the summed index along their rows.
//
// A block computes tiles of 16 kM x 32 kN, one after the other. Its warps share the summed index: warp w takes chunks
// w, w + 8, ... of 16 of it for the whole tile, so that every operand is read once a block, from the caches straight to
// registers, in the layout of the tensor core. The eight partial sums meet in shared memory, added in the order of the
// warps: the bits of a sum do not depend on which block computes it. What the next tile needs that lies ready, its
// weights above all, is loaded before the partial sums of this one are added: loads are in flight while threads wait.
//
// With one warp in two cycles a scheduler, what counts is how many instructions a warp issues from one barrier to the
// next. So matrices are padded to whole tiles (nothing is compared with an end), and the operands of a tile lie at
// fixed distances from one address.
#pragma once

#include "mma.h"
#include "unrolled_bc_schedule.h"

namespace sdw::unrolled {

constexpr int kTiles = kColumns / 8;  // tensor-core tiles across a group of columns

// Floats from one row of partial sums to the next: no two lanes meet in a bank. The first one behind the tile's columns
// holds a sum of the left operand.
SDW_HOST_DEVICE constexpr int partial_stride(int kN) { return kColumns * kN + 8; }
SDW_HOST_DEVICE constexpr int partial_floats(int kM, int kN) { return kWarps * 16 * kM * partial_stride(kN); }

// The operands of a sum of one or two products, each with `chunks` chunks of 16 along the summed index: where the
// tile's rows begin (left, right; right of the tile's second group of columns, if there is one, `second` floats
// behind).
struct Term {
    const float* left;
    const float* right;
};
struct Task {
    Term term[2];
    int count;
    int chunks;
    int late = 0;  // not 0: left of term[0] is known only after Tiles::ready(), its chunks so many floats apart
    bool left_sums = false;  // the rows of term[0]'s left are summed as well
    int64_t second = 0;
};

// The same for all lanes, and known to be: branches on it need no reconvergence.
__device__ inline int warp_index() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0); }

__device__ inline float4 load4(const float* address) { return *reinterpret_cast<const float4*>(address); }

// tf32: per chunk two tensor-core steps of 8. The order along the summed index is free as long as both operands share
// it, so that a lane's four neighbors serve as columns t and t + 4 of both steps. Operands are rounded where they are
// stored: to nearest, once, in place of three instructions a number in every product.
struct Tf32 {
    struct Left {
        float4 low, high;  // rows 0 to 7 and 8 to 15
    };
    using Right = float4;

    __device__ static float rounded(float x) { return to_tf32(x); }

    // Of a lane's first number in a tile.
    __device__ static int left_offset(int lane) { return 4 * lane; }
    __device__ static int right_offset(int lane) { return 4 * lane; }

    __device__ static Left left(const float* low, const float* high) { return {load4(low), load4(high)}; }
    __device__ static Right right(const float* tile) { return load4(tile); }

    // This lane's share of the sums of rows g and g + 8.
    __device__ static float2 row_sums(const Left& a, int) {
        return make_float2((a.low.x + a.low.y) + (a.low.z + a.low.w), (a.high.x + a.high.y) + (a.high.z + a.high.w));
    }

    // The tensor-core tiles from number `at` on, of kT across the tile.
    template <int kM, int kT>
    __device__ static void multiply(float (&sum)[kM][kT][4], const Left (&a)[kM], const Right (&b)[kTiles], int at) {
#pragma unroll
        for (int i = 0; i < kM; ++i) {
            const float first[4] = {a[i].low.x, a[i].high.x, a[i].low.y, a[i].high.y};
#pragma unroll
            for (int j = 0; j < kTiles; ++j) mma_tf32(sum[i][at + j], first, {b[j].x, b[j].y});
        }
#pragma unroll
        for (int i = 0; i < kM; ++i) {
            const float second[4] = {a[i].low.z, a[i].high.z, a[i].low.w, a[i].high.w};
#pragma unroll
            for (int j = 0; j < kTiles; ++j) mma_tf32(sum[i][at + j], second, {b[j].z, b[j].w});
        }
    }
};

// float32: the same tiles and the same owner of each sum, by multiply-adds in order; loads as it goes.
struct Ieee {
    struct Left {
        const float *low, *high;
    };
    using Right = const float*;

    __device__ static float rounded(float x) { return x; }

    __device__ static int left_offset(int lane) { return lane / 4 * 16; }
    __device__ static int right_offset(int lane) { return lane % 4 * 32; }

    __device__ static Left left(const float* low, const float* high) { return {low, high}; }
    __device__ static Right right(const float* tile) { return tile; }

    __device__ static float2 row_sums(const Left& a, int lane) {
        const float4 low = load4(a.low + lane % 4 * 4), high = load4(a.high + lane % 4 * 4);
        return make_float2((low.x + low.y) + (low.z + low.w), (high.x + high.y) + (high.z + high.w));
    }

    __device__ static float dot(float sum, float4 x, float4 y) {
        return fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, sum))));
    }
    // The tensor-core tiles from number `at` on, of kT across the tile.
    template <int kM, int kT>
    __device__ static void multiply(float (&sum)[kM][kT][4], const Left (&a)[kM], const Right (&b)[kTiles], int at) {
#pragma unroll 1
        for (int k = 0; k < 16; k += 4) {
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
                const float4 even = load4(b[j] + k), odd = load4(b[j] + 16 + k);
#pragma unroll
                for (int i = 0; i < kM; ++i) {
                    const float4 low = load4(a[i].low + k), high = load4(a[i].high + k);
                    sum[i][at + j][0] = dot(sum[i][at + j][0], low, even);
                    sum[i][at + j][1] = dot(sum[i][at + j][1], low, odd);
                    sum[i][at + j][2] = dot(sum[i][at + j][2], high, even);
                    sum[i][at + j][3] = dot(sum[i][at + j][3], high, odd);
                }
            }
        }
    }
};

// What a warp holds of a task's operands: of each term its first two chunks.
template <typename Product, int kM, int kN, int kTerms>
struct Operands {
    typename Product::Left left[kTerms][2][kM];
    typename Product::Right right[kTerms][2][kN][kTiles];

    // `from` is this lane's first number of the chunk.
    __device__ void load_left(int term, int q, const float* from) {
#pragma unroll
        for (int i = 0; i < kM; ++i) left[term][q][i] = Product::left(from + 256 * i, from + 256 * i + 128);
    }
    __device__ void load_right(int term, int q, const float* from, int64_t second) {
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int j = 0; j < kTiles; ++j) right[term][q][n][j] = Product::right(from + n * second + 128 * j);
    }
};

// What a thread has of a tile in the end: rows `row` and columns `column` and + 1, a warp an 8 x 8 part of the tile;
// and where they lie, from the tile's corner on, in a matrix, in its transpose (column + lane / 4, rows 2t and 2t + 1
// of the part), and on a strip.
struct Place {
    int row, column;
    int in_matrix, in_transpose, on_strip;

    __device__ static Place of(int warp, int lane, int i) {
        const int down = 2 * i + warp / 4, across = warp % 4, g = lane / 4, t = lane % 4;  // parts; within the part
        const int inside = g * 16 + across % 2 * 8 + 2 * t;
        return {8 * down + g, 8 * across + 2 * t, across / 2 * kBlock + down * 128 + inside,
                down / 2 * kBlock + across * 128 + g * 16 + down % 2 * 8 + 2 * t,
                across / 2 * kStripBlock + down * 128 + inside};
    }
};

// Computes tiles one after the other. Tiles is where they come from and go to:
//     valid(), advance()       is there a tile; the next one
//     task()                   its operands; of one term or, where kTerms is 2, of two
//     ready()                  waits for what comes late, where kLate; all threads call
//     late_left(f)             f(where that lies, floats from chunk to chunk)
//     fetch(place, n)          what the epilogue needs of memory, early
//     finish(place, n, x0, x1, fetched)    takes two neighbors of the product, in group n of the tile's columns, and
//                              passes on what others wait for; all lanes of a warp call
//     store(place, n, x)       stores what finish() returned, which nobody waits for
//     finish_left(row, sum)    takes a row's sum of the left operand
// `partial` is shared memory for two times partial_floats(kM, kN). All warps pass a barrier a tile, and two tiles never
// use the same half in turn, so that none waits twice.
template <typename Product, int kM, int kN, typename Tiles>
__device__ void run_tiles(Tiles& tiles, float* partial, unsigned& half) {
    constexpr int kParts = kM * kN;  // of 8 x 8, a warp
    constexpr int kStride = partial_stride(kN), kWarpFloats = 16 * kM * kStride;
    const int warp = warp_index(), lane = static_cast<int>(threadIdx.x) % 32;
    const int g = lane / 4, t = lane % 4;
    const int left_lane = Product::left_offset(lane), right_lane = Product::right_offset(lane);
    if (!tiles.valid()) return;
    Task task = tiles.task();
    constexpr int kTerms = Tiles::kTerms;
    Operands<Product, kM, kN, kTerms> operands;
    using Fetched = decltype(tiles.fetch(Place{}, 0));
    const auto place_of = [&](int part) { return Place::of(warp, lane, kM == 2 ? part : 0); };
    const auto has_both = [&]() { return kParts == 2 && (kM == 2 || task.second != 0); };
    // Chunks warp and warp + 8 of either term, at fixed distances, but for what comes late; and what the epilogue
    // needs.
    Fetched fetched[kParts];
    const auto load_early = [&]() {
        operands = {};  // so that no register of the tile before seems in use until it is loaded
#pragma unroll
        for (int term = 0; term < kTerms; ++term) {
            const float* left = task.term[term].left + warp * kBlock + left_lane;
            const float* right = task.term[term].right + warp * kBlock + right_lane;
#pragma unroll
            for (int q = 0; q < 2; ++q) {
                if (term >= task.count || warp + kWarps * q >= task.chunks) continue;
                operands.load_right(term, q, right + kWarps * q * kBlock, task.second);
                if (term > 0 || !Tiles::kLate || task.late == 0)
                    operands.load_left(term, q, left + kWarps * q * kBlock);
            }
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part)
            if (part == 0 || has_both()) fetched[part] = tiles.fetch(place_of(part), kN == 2 ? part : 0);
    };
    load_early();
    for (bool more = true; more;) {
        const bool both = has_both();
        tiles.ready();
        if (Tiles::kLate && task.late != 0) {
            tiles.late_left([&](const float* left, int block) {
                task.term[0].left = left;
#pragma unroll
                for (int q = 0; q < 2; ++q)
                    if (warp + kWarps * q < task.chunks)
                        operands.load_left(0, q, left + (warp + kWarps * q) * block + left_lane);
            });
        }
        float sum[kM][kN * kTiles][4] = {};
        float2 left_sums[kM] = {};
        const auto multiply = [&](int term, int q, bool sums_left) {
#pragma unroll
            for (int n = 0; n < kN; ++n)
                if (n == 0 || both)
                    Product::multiply(sum, operands.left[term][q], operands.right[term][q][n], n * kTiles);
            if constexpr (kM == 2) {
                if (!sums_left) return;
#pragma unroll
                for (int i = 0; i < kM; ++i) {
                    const float2 rows = Product::row_sums(operands.left[term][q][i], lane);
                    left_sums[i].x += rows.x;
                    left_sums[i].y += rows.y;
                }
            }
        };
#pragma unroll
        for (int term = 0; term < kTerms; ++term)
#pragma unroll
            for (int q = 0; q < 2; ++q)
                if (term < task.count && warp + kWarps * q < task.chunks)
                    multiply(term, q, term == 0 && task.left_sums);
        // Products of more than 16 chunks.
#pragma unroll 1
        for (int term = 0; term < task.count && task.chunks > 2 * kWarps; ++term) {
            const int left_block = task.late != 0 && term == 0 ? task.late : kBlock;
            const float* left = (term == 0 ? task.term[0].left : task.term[1].left) + left_lane;
            const float* right = (term == 0 ? task.term[0].right : task.term[1].right) + right_lane;
#pragma unroll 1
            for (int first = warp + 2 * kWarps; first < task.chunks; first += 2 * kWarps) {
#pragma unroll
                for (int q = 0; q < 2; ++q) {
                    const int chunk = first + kWarps * q;
                    if (chunk >= task.chunks) continue;
                    operands.load_right(0, q, right + static_cast<int64_t>(chunk) * kBlock, task.second);
                    operands.load_left(0, q, left + static_cast<int64_t>(chunk) * left_block);
                }
#pragma unroll
                for (int q = 0; q < 2; ++q)
                    if (first + kWarps * q < task.chunks) multiply(0, q, term == 0 && task.left_sums);
            }
        }
        // Partial sums of all warps.
        float* const partials = partial + (half++ & 1) * partial_floats(kM, kN);
        float* const mine = partials + warp * kWarpFloats + g * kStride + 2 * t;
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
            for (int j = 0; j < kN * kTiles; ++j) {
                if (j >= kTiles && !both) continue;
#pragma unroll
                for (int low = 0; low < 2; ++low)
                    *reinterpret_cast<float2*>(mine + (16 * i + 8 * low) * kStride + 8 * j) =
                        make_float2(sum[i][j][2 * low], sum[i][j][2 * low + 1]);
            }
        const bool sums_left = kM == 2 && task.left_sums;
        if (sums_left) {
#pragma unroll
            for (int i = 0; i < kM; ++i) {
#pragma unroll
                for (int lanes = 1; lanes <= 2; lanes *= 2) {
                    left_sums[i].x += __shfl_xor_sync(0xffffffffu, left_sums[i].x, lanes);
                    left_sums[i].y += __shfl_xor_sync(0xffffffffu, left_sums[i].y, lanes);
                }
                if (t != 0) continue;
                mine[16 * i * kStride + kColumns * kN] = left_sums[i].x;
                mine[(16 * i + 8) * kStride + kColumns * kN] = left_sums[i].y;
            }
        }
        const Tiles here = tiles;
        Fetched known[kParts];
#pragma unroll
        for (int part = 0; part < kParts; ++part) known[part] = fetched[part];
        tiles.advance();
        more = tiles.valid();
        if (more) {
            task = tiles.task();
            load_early();
        }
        __syncthreads();
        float2 result[kParts];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            if (part > 0 && !both) continue;
            const Place place = place_of(part);
            const float* from = partials + place.row * kStride + place.column + (kN == 2 ? part * kColumns : 0);
            float2 total = make_float2(0, 0);
#pragma unroll
            for (int w = 0; w < kWarps; ++w) {
                const float2 x = *reinterpret_cast<const float2*>(from + w * kWarpFloats);
                total.x += x.x;
                total.y += x.y;
            }
            result[part] = here.finish(place, kN == 2 ? part : 0, total.x, total.y, known[part]);
            if (!sums_left || place.column != 0) continue;
            float left_sum = 0;
            for (int w = 0; w < kWarps; ++w) left_sum += from[w * kWarpFloats + kColumns * kN];
            here.finish_left(place.row, left_sum);
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part)
            if (part == 0 || both) here.store(place_of(part), kN == 2 ? part : 0, result[part]);
    }
}

}  // namespace sdw::unrolled
