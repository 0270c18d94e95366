// Products of tiled matrices (unrolled_bc_schedule.h) by one block: sums of left x right-transposed, both operands
// tiled with the summed index along their rows.
//
// A block computes tiles of 16 kM x 32, one after the other. Its warps share the summed index: warp w takes chunks
// w, w + 8, ... of 16 of it for the whole tile, so that every operand is read once a block, from the caches straight to
// registers, in the layout of the tensor core. The eight partial sums meet in shared memory, added in the order of the
// warps: the bits of a sum do not depend on which block computes it. What the next tile needs that lies ready, its
// weights above all, is loaded before the partial sums of this one are: loads are in flight while threads wait.
#pragma once

#include "mma.h"
#include "unrolled_bc_schedule.h"

namespace sdw::unrolled {

constexpr int kTiles = kColumns / 8;  // tensor-core tiles across a block's tile
// Floats from one row of partial sums to the next: no two lanes meet in a bank. Column 32 holds sums of the left
// operand.
constexpr int kPartialStride = kColumns + 8;

SDW_HOST_DEVICE constexpr size_t partial_floats(int kM) {
    return static_cast<size_t>(kWarps) * 16 * kM * kPartialStride;
}

// The operands of a sum of one or two products, each with `chunks` chunks of 16 along the summed index. Both begin at
// the tile's first row; past the end, loads repeat the last.
struct Term {
    const float* left;
    const float* right;
};
struct Task {
    Term term[2];
    int count;
    int chunks;
    int left_tiles, right_tiles;  // of 16 and of 8 rows, up to the operands' ends
    bool late;                    // left of term[0] is known only after Tiles::ready()
    bool left_sums;               // the rows of term[0]'s left are summed as well
};

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

    template <int kM>
    __device__ static void multiply(float (&sum)[kM][kTiles][4], const Left (&a)[kM], const Right (&b)[kTiles]) {
#pragma unroll
        for (int i = 0; i < kM; ++i) {
            const float first[4] = {a[i].low.x, a[i].high.x, a[i].low.y, a[i].high.y};
#pragma unroll
            for (int j = 0; j < kTiles; ++j) mma_tf32(sum[i][j], first, {b[j].x, b[j].y});
        }
#pragma unroll
        for (int i = 0; i < kM; ++i) {
            const float second[4] = {a[i].low.z, a[i].high.z, a[i].low.w, a[i].high.w};
#pragma unroll
            for (int j = 0; j < kTiles; ++j) mma_tf32(sum[i][j], second, {b[j].z, b[j].w});
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
    template <int kM>
    __device__ static void multiply(float (&sum)[kM][kTiles][4], const Left (&a)[kM], const Right (&b)[kTiles]) {
#pragma unroll 1
        for (int k = 0; k < 16; k += 4) {
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
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

// A warp's chunks of a task, counted through both terms: item i is chunk warp + 8 (i % each) of term i / each.
template <typename Product, int kM>
struct Operands {
    static constexpr int kSlots = 4 / kM;  // chunks that are in registers at a time
    typename Product::Left left[kSlots][kM];
    typename Product::Right right[kSlots][kTiles];
    int each, items;

    __device__ void begin(const Task& task, int warp) {
        each = (task.chunks - warp + kWarps - 1) / kWarps;
        items = task.count * each;
    }
    __device__ bool is_late(const Task& task, int item) const { return task.late && item < each; }

    __device__ int64_t chunk(int item, int warp) const { return warp + kWarps * (item < each ? item : item - each); }

    __device__ void load_left(const Task& task, int slot, int item, int warp, int lane) {
        const int stride = task.chunks * 128;
        const float* from = item < each ? task.term[0].left : task.term[1].left;
        from += chunk(item, warp) * 128 + Product::left_offset(lane);
#pragma unroll
        for (int i = 0; i < kM; ++i) {
            const float* tile = from + (i < task.left_tiles ? i : task.left_tiles - 1) * 2 * stride;
            left[slot][i] = Product::left(tile, tile + stride);
        }
    }
    __device__ void load_right(const Task& task, int slot, int item, int warp, int lane) {
        const int stride = task.chunks * 128;
        const float* from = item < each ? task.term[0].right : task.term[1].right;
        from += chunk(item, warp) * 128 + Product::right_offset(lane);
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
            right[slot][j] = Product::right(from + (j < task.right_tiles ? j : task.right_tiles - 1) * stride);
    }
};

// What a thread has of a tile in the end: of each 8 x 8 part of it that is its warp's, row g and columns 2t, 2t + 1.
struct Place {
    int row, column;
};

// Computes tiles one after the other. Tiles is where they come from and go to:
//     valid(), advance()       is there a tile; the next one
//     task()                   its operands
//     ready()                  waits for what comes late;  late_left(): there it is. All threads of the block call
//     fetch(place)             what the epilogue needs of memory, early
//     finish(place, x0, x1, fetched)    takes two neighbors of the product; all lanes of a warp call for an 8 x 8 part
//     finish_left(row, sum)    takes a row's sum of the left operand
// `partial` is shared memory for two times partial_floats(kM). All warps pass a barrier a tile, and two tiles never use
// the same half in turn, so that none waits twice.
template <typename Product, int kM, typename Tiles>
__device__ void run_tiles(Tiles& tiles, float* partial, unsigned& half) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int g = lane / 4, t = lane % 4;
    if (!tiles.valid()) return;
    constexpr int kSlots = Operands<Product, kM>::kSlots;
    Task task = tiles.task();
    Operands<Product, kM> operands;
    const auto load_early = [&]() {
        operands = {};  // so that no register of the tile before seems in use until it is loaded
        operands.begin(task, warp);
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) {
            if (slot >= operands.items) continue;
            operands.load_right(task, slot, slot, warp, lane);
            if (!operands.is_late(task, slot)) operands.load_left(task, slot, slot, warp, lane);
        }
    };
    load_early();
    for (bool more = true; more;) {
        decltype(tiles.fetch(Place{})) fetched[kM];
        const auto place = [&](int i) { return Place{16 * i + warp / 4 * 8 + g, warp % 4 * 8 + 2 * t}; };
        // The parts of a tile that exist: the same answer for a whole warp.
        const auto exists = [&](int i) { return i < task.left_tiles && warp % 4 < task.right_tiles; };
#pragma unroll
        for (int i = 0; i < kM; ++i)
            if (exists(i)) fetched[i] = tiles.fetch(place(i));
        tiles.ready();
        if (task.late) {
            task.term[0].left = tiles.late_left();
#pragma unroll
            for (int slot = 0; slot < kSlots; ++slot) {
                if (slot >= operands.each) continue;
                operands.load_left(task, slot, slot, warp, lane);
            }
        }
        float sum[kM][kTiles][4] = {};
        float2 left_sums[kM] = {};
#pragma unroll 1
        for (int first = 0; first < operands.items; first += kSlots) {
#pragma unroll
            for (int slot = 0; slot < kSlots; ++slot) {
                if (first + slot >= operands.items) continue;
                Product::multiply(sum, operands.left[slot], operands.right[slot]);
                if (task.left_sums && first + slot < operands.each) {
#pragma unroll
                    for (int i = 0; i < kM; ++i) {
                        const float2 more_rows = Product::row_sums(operands.left[slot][i], lane);
                        left_sums[i].x += more_rows.x;
                        left_sums[i].y += more_rows.y;
                    }
                }
                const int next = first + slot + kSlots;
                if (next >= operands.items) continue;
                operands.load_right(task, slot, next, warp, lane);
                operands.load_left(task, slot, next, warp, lane);
            }
        }
        float* const mine = partial + (half++ & 1) * partial_floats(kM);
        const auto partial_at = [&](int w, int row, int column) {
            return mine + (w * 16 * kM + row) * kPartialStride + column;
        };
        if (operands.items > 0) {
#pragma unroll
            for (int i = 0; i < kM; ++i) {
#pragma unroll
                for (int j = 0; j < kTiles; ++j) {
                    *reinterpret_cast<float2*>(partial_at(warp, 16 * i + g, 8 * j + 2 * t)) =
                        make_float2(sum[i][j][0], sum[i][j][1]);
                    *reinterpret_cast<float2*>(partial_at(warp, 16 * i + 8 + g, 8 * j + 2 * t)) =
                        make_float2(sum[i][j][2], sum[i][j][3]);
                }
                if (task.left_sums) {
                    for (int lanes = 1; lanes <= 2; lanes *= 2) {
                        left_sums[i].x += __shfl_xor_sync(0xffffffffu, left_sums[i].x, lanes);
                        left_sums[i].y += __shfl_xor_sync(0xffffffffu, left_sums[i].y, lanes);
                    }
                    if (t == 0) {
                        *partial_at(warp, 16 * i + g, kColumns) = left_sums[i].x;
                        *partial_at(warp, 16 * i + 8 + g, kColumns) = left_sums[i].y;
                    }
                }
            }
        }
        const Task done = task;
        const Tiles here = tiles;
        tiles.advance();
        more = tiles.valid();
        if (more) {
            task = tiles.task();
            load_early();
        }
        __syncthreads();
        const int warps = done.chunks < kWarps ? done.chunks : kWarps;
#pragma unroll
        for (int i = 0; i < kM; ++i) {
            if (!(i < done.left_tiles && warp % 4 < done.right_tiles)) continue;
            const Place at = place(i);
            float2 total = make_float2(0, 0);
            for (int w = 0; w < warps; ++w) {
                const float2 x = *reinterpret_cast<const float2*>(partial_at(w, at.row, at.column));
                total.x += x.x;
                total.y += x.y;
            }
            here.finish(at, total.x, total.y, fetched[i]);
            if (done.left_sums && at.column == 0) {
                float left_sum = 0;
                for (int w = 0; w < warps; ++w) left_sum += *partial_at(w, at.row, kColumns);
                here.finish_left(at.row, left_sum);
            }
        }
    }
}

}  // namespace sdw::unrolled
