// The outer loss and its gradient for the parameters. A block takes tiles of 32 rows through the net and back; the
// tile's activations stay with the block (in shared memory if they fit), weights come from the second-level cache in
// pieces through shared memory, and each block adds its weight gradients into a slab of the workspace. A second launch
// adds the slabs up in their order. Which rows go to which block depends on M alone, and so do the bits.
//
// delta_l takes the place of h_l on the way back: what is left to do at layer l needs h_{l-1} and delta_l only.
#include <algorithm>

#include "head.h"
#include "mma.h"
#include "reduce.h"
#include "sdw/behavior_matching.h"

namespace sdw {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 32;      // rows of a tile: activations of three 256-wide layers then fit shared memory
constexpr int kColumns = 256;  // outputs of a pass: 32 a warp
constexpr int kDepth = 16;     // inner length of a piece of the weights
constexpr int kLayers = 32;    // at most: the parameters of a launch are no more than 4 KB
constexpr int kBlocks = 128;   // at most, and as many slabs
constexpr int kFinishThreads = 256;
constexpr int kRing = 4, kShortRing = 2;  // pieces of the weights in shared memory; the short ring where room is short

// A piece of the weights in shared memory, one buffer of a ring. Forward it is read along a row of W, backward across
// rows; the strides keep both the writes and the tensor cores' reads free of bank conflicts.
constexpr int kForwardStride = kDepth + 4, kBackwardStride = kColumns + 8;
constexpr int kPiece = kColumns * kForwardStride;
static_assert(kDepth * kBackwardStride <= kPiece, "either form must fit");

// Columns of a tile's activations from one row to the next: whole warp tiles, which are read beyond the width, and four
// more, so that the eight rows of a fragment lie in different banks.
SDW_HOST_DEVICE inline int padded(int64_t width) { return static_cast<int>((width + 31) / 32 * 32 + 4); }

struct Params {
    int64_t rows, tiles;
    int layers;
    int widths[kLayers + 1];
    int offsets[kLayers + 1];  // of h_l in a block's activations
    int activations;           // floats of a block
    const float* weights[kLayers];
    const float* biases[kLayers];
    int64_t gradient_at[kLayers];  // of W_l in a slab; b_l follows
    int64_t slab;                  // floats of a slab
    const float *states, *targets, *row_weights;
    Head head;
    float scale;     // the loss is this times the sum of the rows' weighted losses
    float slope;     // and delta this times their weighted errors (head.h)
    double* sums;    // one a block
    float* slabs;    // one a block, or null: loss alone
    float* spilled;  // activations of every block, where shared memory is too small
};

// Element e of a piece as the threads load it, neighbors in memory to neighbors in a warp.
template <bool forward>
SDW_HOST_DEVICE inline int piece_k(int e) {
    return forward ? e % kDepth : e / kColumns;
}
template <bool forward>
SDW_HOST_DEVICE inline int piece_n(int e) {
    return forward ? e / kDepth : e % kColumns;
}
template <bool forward>
SDW_HOST_DEVICE inline int piece_at(int k, int n) {
    return forward ? n * kForwardStride + k : k * kBackwardStride + n;
}

// Starts copying a piece: right(k, n) of x = left right for k from `from` and n from `first` on, W_l(n, k) forward and
// W_l(k, n) backward, 0 outside.
template <bool forward>
__device__ inline void fetch(const float* weights, int stride, int depth, int columns, int from, int first,
                             float* piece) {
#pragma unroll 4
    for (int e = threadIdx.x; e < kColumns * kDepth; e += kThreads) {
        const int k = from + piece_k<forward>(e), n = first + piece_n<forward>(e);
        float* const to = piece + piece_at<forward>(piece_k<forward>(e), piece_n<forward>(e));
        if (k < depth && n < columns)
            copy_async_4(
                to, weights + (forward ? static_cast<int64_t>(n) * stride + k : static_cast<int64_t>(k) * stride + n));
        else
            *to = 0.0f;
    }
}

// Accumulators of a warp for 32 rows and 32 columns, as mma_tf32 lays them out: [i][j] for rows 16 i and columns 8 j.
struct Accumulators {
    float x[2][4][4] = {};

    // Calls store(row, column, value) for each.
    template <typename Store>
    __device__ void for_each(Store store) const {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int c = 0; c < 4; ++c) store(16 * i + g + c / 2 * 8, 8 * j + 2 * t + c % 2, x[i][j][c]);
    }
};

// acc += left(m, k) right(k, n) over eight k, m and n below 32; columns from `limit` on are not wanted. In float32 each
// lane multiplies for its own accumulators; else the operands are rounded to tf32 for the tensor cores.
template <bool ieee, typename Left, typename Right>
__device__ inline void multiply_eight(Accumulators& acc, int limit, Left left, Right right) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    if constexpr (ieee) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const float a[2][2] = {{left(g, k), left(g + 8, k)}, {left(g + 16, k), left(g + 24, k)}};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (8 * j >= limit) continue;
                const float b[2] = {right(k, 8 * j + 2 * t), right(k, 8 * j + 2 * t + 1)};
#pragma unroll
                for (int i = 0; i < 2; ++i)
#pragma unroll
                    for (int c = 0; c < 4; ++c) acc.x[i][j][c] = fmaf(a[i][c / 2], b[c % 2], acc.x[i][j][c]);
            }
        }
    } else {
        float a[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int c = 0; c < 4; ++c) a[i][c] = to_tf32(left(16 * i + g + c % 2 * 8, t + c / 2 * 4));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (8 * j >= limit) continue;
            const float b[2] = {to_tf32(right(t, 8 * j + g)), to_tf32(right(t + 4, 8 * j + g))};
            mma_tf32(acc.x[0][j], a[0], b);
            mma_tf32(acc.x[1][j], a[1], b);
        }
    }
}

// x (32, columns) = left (32, depth) right; x goes out by store(row, column, value). The pieces of `right` come from
// W_l (rows of `stride` numbers) through a ring of `count` buffers, so that count - 1 of them are on their way while
// one is multiplied. Begins by waiting for whoever still reads the ring or writes `left`; ends without a barrier.
template <bool ieee, bool forward, int count, typename Store>
__device__ void product(const float* left, int depth, const float* weights, int stride, int columns, float* ring,
                        Store store) {
    const int warp_column = threadIdx.x / 32 * 32, left_stride = padded(depth);
    for (int first = 0; first < columns; first += kColumns) {
        Accumulators acc;
        const int limit = columns - first - warp_column;
        const auto fetch_piece = [&](int number) {  // beyond the last an empty group, so that waits can count
            if (number * kDepth < depth)
                fetch<forward>(weights, stride, depth, columns, number * kDepth, first, ring + number % count * kPiece);
            copy_async_commit();
        };
        __syncthreads();
        for (int number = 0; number < count - 1; ++number) fetch_piece(number);
        for (int from = 0; from < depth; from += kDepth) {
            const int number = from / kDepth;
            const float* const piece = ring + number % count * kPiece;
            copy_async_wait<count - 2>();
            __syncthreads();  // this piece is there, and nobody reads the one before, whose buffer is filled next
            fetch_piece(number + count - 1);
#pragma unroll
            for (int k0 = 0; k0 < kDepth; k0 += 8) {
                if (limit <= 0 || from + k0 >= depth) break;
                multiply_eight<ieee>(
                    acc, limit, [&](int m, int k) { return left[m * left_stride + from + k0 + k]; },
                    [&](int k, int n) { return piece[piece_at<forward>(k0 + k, warp_column + n)]; });
            }
        }
        acc.for_each([&](int row, int column, float value) {
            if (column < limit) store(row, first + warp_column + column, value);
        });
    }
    copy_async_wait<0>();
}

// slab W_l (out, in) += delta_lᵀ h_{l-1}, b_l += column sums of delta_l; the first tile of a block sets them.
template <bool ieee>
__device__ void add_gradients(const float* delta, const float* h, int out, int in, float* slab, bool set) {
    const int delta_stride = padded(out), h_stride = padded(in);
    const int across = (in + 31) / 32, count = (out + 31) / 32 * across;
    for (int tile = threadIdx.x / 32; tile < count; tile += kWarps) {
        const int row = tile / across * 32, column = tile % across * 32;
        Accumulators acc;
        for (int k0 = 0; k0 < kRows; k0 += 8) {
            multiply_eight<ieee>(
                acc, in - column, [&](int m, int k) { return delta[(k0 + k) * delta_stride + row + m]; },
                [&](int k, int n) { return h[(k0 + k) * h_stride + column + n]; });
        }
        acc.for_each([&](int m, int n, float value) {
            if (row + m >= out || column + n >= in) return;
            float& sum = slab[static_cast<int64_t>(row + m) * in + column + n];
            sum = set ? value : sum + value;
        });
    }
    float* bias = slab + static_cast<int64_t>(out) * in;
    for (int n = threadIdx.x; n < out; n += kThreads) {
        float sum = 0.0f;
        for (int row = 0; row < kRows; ++row) sum += delta[row * delta_stride + n];
        bias[n] = set ? sum : bias[n] + sum;
    }
}

// From the pre-activations z in h_L: delta_L in their place; returns the thread's share of the sum of the rows'
// weighted losses. Rows beyond the last have weight zero. `sums` is memory for a tile's rows.
__device__ inline double output_delta(const Params& p, int64_t first, float* z, RowSums* sums) {
    const int outputs = p.widths[p.layers], stride = padded(outputs);
    const float* const targets = p.targets + first * outputs;
    if (p.head == Head::softmax) {
        for (int row = threadIdx.x / 32; row < kRows && first + row < p.rows; row += kWarps) {
            const RowSums row_sums = output_sums(
                outputs, threadIdx.x % 32, [&](int column) { return z[row * stride + column]; },
                [&](int column) { return targets[row * outputs + column]; });
            if (threadIdx.x % 32 == 0) sums[row] = row_sums;
        }
        __syncthreads();
    }
    double loss = 0.0;
    for (int e = threadIdx.x; e < kRows * outputs; e += kThreads) {
        const int row = e / outputs, column = e % outputs;
        float& at = z[row * stride + column];
        const float weight = first + row < p.rows ? p.row_weights[first + row] : 0.0f;
        if (weight == 0.0f) {
            at = 0.0f;
            continue;
        }
        const float y = targets[row * outputs + column], a = head_output(p.head, at, sums[row]);
        const float error = head_error(p.head, a, y, sums[row]);
        loss += static_cast<double>(weight) * head_loss(p.head, at, y, error, sums[row]);
        at = head_delta(p.head, p.slope * weight * error, a);
    }
    return loss;
}

// in_shared: the activations lie in shared memory, which the compiler then knows. `count` buffers in the ring.
template <bool ieee, bool in_shared, int count>
__global__ void __launch_bounds__(kThreads, 1) run_tiles(const __grid_constant__ Params p) {
    float* const ring = reinterpret_cast<float*>(shared_memory());
    float* const h = in_shared ? ring + count * kPiece : p.spilled + static_cast<int64_t>(blockIdx.x) * p.activations;
    float* const slab = p.slabs == nullptr ? nullptr : p.slabs + blockIdx.x * p.slab;
    for (int i = threadIdx.x; i < p.activations; i += kThreads) h[i] = 0.0f;  // what is read beyond the widths
    double loss = 0.0;
    for (int64_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
        const int64_t first = tile * kRows;
        const int inputs = p.widths[0];
        __syncthreads();
        for (int e = threadIdx.x; e < kRows * inputs; e += kThreads) {
            const int row = e / inputs, column = e % inputs;
            h[row * padded(inputs) + column] = first + row < p.rows ? p.states[(first + row) * inputs + column] : 0.0f;
        }
        for (int l = 0; l < p.layers; ++l) {
            const int in = p.widths[l], out = p.widths[l + 1];
            float* const next = h + p.offsets[l + 1];
            const float* const bias = p.biases[l];
            const bool hidden = l + 1 < p.layers;
            product<ieee, true, count>(
                h + p.offsets[l], in, p.weights[l], in, out, ring, [&](int row, int column, float x) {
                    x += __ldg(bias + column);
                    next[row * padded(out) + column] = hidden && x < 0.0f ? 0.0f : x;  // NaN stays
                });
        }
        __syncthreads();
        loss += output_delta(p, first, h + p.offsets[p.layers], reinterpret_cast<RowSums*>(ring));
        if (slab == nullptr) continue;
        for (int l = p.layers - 1; l >= 0; --l) {
            const int in = p.widths[l], out = p.widths[l + 1];
            const float* const delta = h + p.offsets[l + 1];
            float* const below = h + p.offsets[l];
            __syncthreads();
            add_gradients<ieee>(delta, below, out, in, slab + p.gradient_at[l], tile == blockIdx.x);
            if (l == 0) break;
            product<ieee, false, count>(delta, out, p.weights[l], in, in, ring, [&](int row, int column, float x) {
                float& there = below[row * padded(in) + column];
                there = there > 0.0f ? x : 0.0f;
            });
        }
    }
    __syncthreads();
    loss = block_sum(loss, reinterpret_cast<double*>(ring));
    if (threadIdx.x == 0) p.sums[blockIdx.x] = loss;
}

struct FinishParams {
    const double* sums;
    const float* slabs;
    int blocks;
    int64_t slab;
    float scale;
    float *loss, *gradients;
};

// The loss, and the gradients as the sum of the slabs, in their order.
__global__ void __launch_bounds__(kFinishThreads) finish(FinishParams p) {
    if (blockIdx.x == 0) {
        const double sum = block_sum_of(p.sums, p.blocks, reinterpret_cast<double*>(shared_memory()));
        if (threadIdx.x == 0) *p.loss = static_cast<float>(sum * p.scale);
    }
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
    if (p.gradients == nullptr || i >= p.slab) return;
    float sum = 0.0f;
#pragma unroll 8
    for (int block = 0; block < p.blocks; ++block) sum += p.slabs[block * p.slab + i];
    p.gradients[i] = sum;
}

// How the work is laid out, and where things lie in the workspace.
struct Plan {
    int64_t tiles, slab = 0;
    unsigned blocks;
    int activations = 0;
    size_t shared;
    bool in_shared;
    int ring = kRing;  // buffers
    size_t slabs_at, spilled_at, bytes;

    Plan(int64_t rows, const std::vector<int64_t>& widths, bool want_gradients) : tiles((rows + kRows - 1) / kRows) {
        if (widths.size() > kLayers + 1)
            throw std::runtime_error("behavior_matching: the CUDA kernel takes at most " + std::to_string(kLayers) +
                                     " layers; use backend=\"torch\"");
        blocks = static_cast<unsigned>(std::min<int64_t>(tiles, kBlocks));
        for (size_t l = 0; l < widths.size(); ++l) {
            activations += kRows * padded(widths[l]);
            if (l > 0) slab += widths[l] * (widths[l - 1] + 1);
        }
        const auto needs = [&](int buffers, bool with_activations) {
            return (buffers * kPiece + (with_activations ? activations : 0)) * sizeof(float);
        };
        in_shared = needs(kShortRing, true) <= shared_limit();
        if (in_shared && needs(kRing, true) > shared_limit()) ring = kShortRing;
        shared = needs(ring, in_shared);
        const auto align = [](size_t size) { return (size + 255) / 256 * 256; };
        slabs_at = align(blocks * sizeof(double));
        spilled_at = slabs_at + align(want_gradients ? blocks * slab * sizeof(float) : 0);
        bytes = spilled_at + (in_shared ? 0 : blocks * activations * sizeof(float));
    }
};

template <bool ieee>
auto kernel_for(const Plan& plan) {
    if (!plan.in_shared) return run_tiles<ieee, false, kRing>;
    return plan.ring == kRing ? run_tiles<ieee, true, kRing> : run_tiles<ieee, true, kShortRing>;
}

}  // namespace

size_t behavior_matching_cuda_workspace(int64_t rows, const std::vector<int64_t>& widths, bool want_gradients) {
    return Plan(rows, widths, want_gradients).bytes;
}

void behavior_matching_cuda(const BehaviorMatchingParams& p) {
    const bool want_gradients = p.gradients != nullptr;
    const Plan plan(p.rows, p.widths, want_gradients);
    auto* const workspace = static_cast<unsigned char*>(p.workspace);
    Params params{};
    params.rows = p.rows;
    params.tiles = plan.tiles;
    params.layers = static_cast<int>(p.widths.size()) - 1;
    for (int l = 0, offset = 0; l <= params.layers; ++l) {
        params.widths[l] = static_cast<int>(p.widths[l]);
        params.offsets[l] = offset;
        offset += kRows * padded(p.widths[l]);
    }
    int64_t at = 0;
    for (int l = 0; l < params.layers; ++l) {
        params.gradient_at[l] = at;
        at += p.widths[l + 1] * (p.widths[l] + 1);
    }
    params.activations = plan.activations;
    params.slab = plan.slab;
    params.head = p.head;
    params.scale = 1.0f / (static_cast<float>(p.rows) * static_cast<float>(loss_divisor(p.head, p.widths.back())));
    params.slope = loss_slope(p.head) * params.scale;
    params.sums = reinterpret_cast<double*>(workspace);
    params.slabs = want_gradients ? reinterpret_cast<float*>(workspace + plan.slabs_at) : nullptr;
    params.spilled = reinterpret_cast<float*>(workspace + plan.spilled_at);
    // One problem after another, in the same workspace: the stream keeps them apart.
    for (int64_t r = 0; r < p.problems; ++r) {
        const float* const flat = p.params + r * plan.slab;
        for (int l = 0; l < params.layers; ++l) {
            params.weights[l] = flat + params.gradient_at[l];
            params.biases[l] = params.weights[l] + p.widths[l + 1] * p.widths[l];
        }
        params.states = p.states + r * p.rows * p.widths.front();
        params.targets = p.targets + r * p.rows * p.widths.back();
        params.row_weights = p.weights + r * p.rows;
        launch(p.ieee ? kernel_for<true>(plan) : kernel_for<false>(plan), plan.blocks, kThreads, plan.shared, p.stream,
               params);
        const int64_t numbers = want_gradients ? plan.slab : 1;
        launch(finish, static_cast<unsigned>((numbers + kFinishThreads - 1) / kFinishThreads), kFinishThreads,
               kFinishThreads * sizeof(double), p.stream,
               FinishParams{params.sums, params.slabs, static_cast<int>(plan.blocks), plan.slab, params.scale,
                            p.losses + r, want_gradients ? p.gradients + r * plan.slab : nullptr});
    }
}

}  // namespace sdw
