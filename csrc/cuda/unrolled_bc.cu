// Behavior cloning unrolled, and its adjoint, on CUDA: one persistent kernel a pass.
//
//     u_{t+1}  = mu u_t + alpha g_t,  theta_{t+1} = theta_t - u_{t+1}
//     lambda_t = lambda_{t+1} - alpha (Hessian at theta_t) v_t,  v_t = lambda_{t+1} + mu v_{t+1}
//
// with g_t the gradient of the head's mean loss (sdw/head.h) and momentum mu. Without momentum u is nothing to remember
// and v is lambda: no step reads or writes either.
//
// A problem is run by a group of blocks, one a tile of 16 rows (fewer if the chip is too small). A step is two stages
// with a barrier of the group after each: a block takes its rows through all layers and back, by itself; then every
// warp of the group takes tiles of the weight gradients over all rows, with the update in their epilogue. A tile has
// one owner and a fixed order of summation: the result's bits do not depend on the number of blocks. Groups never wait
// for each other. All operands come from the second-level cache, where a step's 0.6 MB of weights (twice, for both
// ways) and 3.2 MB of activations stay; README.md has the arithmetic.
#include <memory>
#include <utility>

#include "head.h"
#include "product.h"

namespace sdw {
namespace unrolled {
namespace {

struct Kernel {
    Network net;
    Plan plan;
    Layout at;
    Groups groups;
    int problems;
    float* workspace;
    unsigned* counters;  // one a group, kCounterStride apart, zero at the start
    const float* lr;
    float momentum;
    Head head;
    float scale;  // c of head.h
};

struct Forward {
    Kernel kernel;
    const float *observations, *actions, *params;
    float* trained;
};

struct Backward {
    Kernel kernel;
    bool again;
    const float* trained;
    float *observations, *actions, *params, *lr_gradient;
};

// This block among those of its group, and of its team.
struct Member {
    int rank, members;  // of the group
    int part, parts;    // of the team
    int warp, lane;
    unsigned* counter;
    unsigned round;

    __device__ explicit Member(const Kernel& kernel)
        : rank(blockIdx.x % kernel.groups.members),
          members(kernel.groups.members),
          part(rank % kernel.groups.parts),
          parts(kernel.groups.parts),
          warp(threadIdx.x / 32),
          lane(threadIdx.x % 32),
          counter(kernel.counters + kCounterStride * (blockIdx.x / kernel.groups.members)),
          round(0) {}

    __device__ int team() const { return rank / parts; }
    __device__ int teams() const { return members / parts; }
    __device__ int thread() const { return rank * kThreads + static_cast<int>(threadIdx.x); }
    __device__ int threads() const { return members * kThreads; }

    __device__ void wait() { meet(counter, members, ++round); }
    __device__ void wait_team() const {
        if (parts == 1)
            __syncthreads();
        else
            meet_cluster();
    }
};

// A matrix in tiles and its transpose, in tiles of its own.
struct Pair {
    float* rows;     // (height, width)
    float* columns;  // (width, height)
    int height, width;

    __device__ Pair(float* data, int height_, int width_)
        : rows(data), columns(data + static_cast<int64_t>(height_) * width_), height(height_), width(width_) {}

    __device__ float2 get(int row, int column) const {
        return *reinterpret_cast<const float2*>(rows + tiled(row, column, width));
    }
    __device__ void put(int row, int column, float x0, float x1) const {
        *reinterpret_cast<float2*>(rows + tiled(row, column, width)) = make_float2(x0, x1);
        columns[tiled(column, row, height)] = x0;
        columns[tiled(column + 1, row, height)] = x1;
    }
};

// One problem's data in the workspace.
struct Problem {
    const Kernel& kernel;
    const Network& net;
    float* base;
    float lr, momentum;
    Head head;
    float scale;

    __device__ Problem(const Kernel& k, int index)
        : kernel(k),
          net(k.net),
          base(k.workspace + index * k.at.floats),
          lr(k.lr[index]),
          momentum(k.momentum),
          head(k.head),
          scale(k.scale) {}

    __device__ float* theta(int64_t step) const { return base + kernel.at.theta + step * net.theta; }
    __device__ float* pass(int64_t step) const { return base + kernel.at.passes + step * net.pass; }
    __device__ float* velocity() const { return base + kernel.at.velocity; }
    __device__ float* start(int64_t segment) const { return base + kernel.at.starts + 2 * segment * net.theta; }
    __device__ float* start_velocity(int64_t segment) const { return start(segment) + net.theta; }
    __device__ float* adjoint() const { return base + kernel.at.adjoint; }
    __device__ float* direction() const { return base + kernel.at.direction; }
    __device__ float* tangent() const { return base + kernel.at.tangent; }
    __device__ float* actions() const { return base + kernel.at.actions; }

    // Of a set of parameters: W of layer l (out, in), b.
    __device__ Pair weights(float* theta, int l) const {
        return {theta + net.layer[l].weights, net.layer[l].out_padded, net.layer[l].in_padded};
    }
    __device__ float* biases(float* theta, int l) const { return theta + net.layer[l].biases; }

    // Of a pass: what goes into layer l (the observations, where l is 0; they are no part of a pass), what comes out of
    // it, and the gradient before its nonlinearity.
    __device__ Pair input(float* pass, int l) const {
        return l == 0 ? Pair(base + kernel.at.observations, net.rows_padded, net.inputs()) : output(pass, l - 1);
    }
    __device__ Pair output(float* pass, int l) const {
        return {pass + net.layer[l].h, net.rows_padded, net.layer[l].out_padded};
    }
    __device__ Pair delta(float* pass, int l) const {
        return {pass + net.layer[l].delta, net.rows_padded, net.layer[l].out_padded};
    }
};

template <typename Product, int kN, typename Fetch, typename Finish>
__device__ void columns_product(const Terms& terms, Span left, int tiles, const Member& me, Fetch fetch,
                                Finish finish) {
    for (int first = kN * (me.part * kWarps + me.warp); first < tiles; first += kN * kWarps * me.parts)
        product_tiles<Product, true, 1, kN>(terms, left, Span{first, tiles}, me.lane, fetch, finish);
}

// A team's product for 16 of its rows, (16, 16 chunks) x (16 chunks, columns), its columns shared out among the warps.
template <typename Product, typename Fetch, typename Finish>
__device__ void rows_product(const Terms& terms, int row_tile, int columns, const Member& me, Fetch fetch,
                             Finish finish) {
    const Span left{row_tile, row_tile + 1};
    const int tiles = columns / 8, width = tiles_a_warp(tiles, kWarps * me.parts);
    if (width == 1) return columns_product<Product, 1>(terms, left, tiles, me, fetch, finish);
    if (width == 2) return columns_product<Product, 2>(terms, left, tiles, me, fetch, finish);
    columns_product<Product, 4>(terms, left, tiles, me, fetch, finish);
}

__device__ inline float2 masked(float x0, float x1, float2 h) {
    return make_float2(h.x > 0 ? x0 : 0.0f, h.y > 0 ? x1 : 0.0f);
}

// Two neighbors of the output, and delta there, zero in rows of padding.
__device__ inline void put_output(const Problem& p, float* pass, int row, int column, float z0, float z1,
                                  const RowSums& sums) {
    const Pair out = p.output(pass, p.net.layers - 1), delta = p.delta(pass, p.net.layers - 1);
    const float2 y = *reinterpret_cast<const float2*>(p.actions() + tiled(row, column, out.width));
    const float scale = row < p.net.rows ? p.scale : 0.0f;
    const float a0 = head_output(p.head, z0, sums), a1 = head_output(p.head, z1, sums);
    out.put(row, column, a0, a1);
    delta.put(row, column, head_delta(p.head, scale * head_error(p.head, a0, y.x, sums), a0),
              head_delta(p.head, scale * head_error(p.head, a1, y.y, sums), a1));
}

// body(row, column, sums(row)) for every pair of neighbors of a tile of the output, a warp a row.
template <typename Sums, typename Body>
__device__ void whole_rows(const Problem& p, int row_tile, const Member& me, Sums sums, Body body) {
    const int width = p.net.outputs();
    for (int i = me.part * kWarps + me.warp; i < 16; i += kWarps * me.parts) {
        const int row = 16 * row_tile + i;
        const RowSums shared = sums(row);
        for (int column = 2 * me.lane; column < width; column += 64) body(row, column, shared);
    }
    me.wait_team();
}

// From z in place of the output: a softmax needs its whole row, which the columns' owners do not have.
__device__ void softmax_rows(const Problem& p, float* pass, int row_tile, const Member& me) {
    const Pair out = p.output(pass, p.net.layers - 1);
    const int columns = p.net.layer[p.net.layers - 1].out;
    const auto sums = [&](int row) {
        return output_sums(
            columns, me.lane, [&](int column) { return out.rows[tiled(row, column, out.width)]; },
            [&](int column) { return p.actions()[tiled(row, column, out.width)]; });
    };
    whole_rows(p, row_tile, me, sums, [&](int row, int column, const RowSums& shared) {
        const float2 z = out.get(row, column);  // e^z is 0 in columns of padding
        put_output(p, pass, row, column, column < columns ? z.x : -INFINITY, column + 1 < columns ? z.y : -INFINITY,
                   shared);
    });
}

// h of every layer, and delta of the last.
template <typename Product>
__device__ void forward_rows(const Problem& p, float* theta, float* pass, int row_tile, const Member& me) {
    for (int l = 0; l < p.net.layers; ++l) {
        const Pair in = p.input(pass, l), out = p.output(pass, l);
        const float* biases = p.biases(theta, l);
        const bool hidden = l + 1 < p.net.layers;
        const Terms terms{{{in.rows, p.weights(theta, l).rows}}, 1, in.width / 16};
        rows_product<Product>(
            terms, row_tile, out.width, me,
            [&](int, int column) { return *reinterpret_cast<const float2*>(biases + column); },
            [&](int row, int column, float x0, float x1, float2 bias) {
                const float z0 = x0 + bias.x, z1 = x1 + bias.y;
                if (hidden) return out.put(row, column, z0 < 0 ? 0 : z0, z1 < 0 ? 0 : z1);  // NaN stays
                if (p.head == Head::softmax) return out.put(row, column, z0, z1);
                put_output(p, pass, row, column, z0, z1, {});
            });
        me.wait_team();
    }
    if (p.head == Head::softmax) softmax_rows(p, pass, row_tile, me);
}

// delta_{l-1} = m_{l-1} (delta_l W_l)
template <typename Product>
__device__ void backward_rows(const Problem& p, float* theta, float* pass, int row_tile, const Member& me) {
    for (int l = p.net.layers - 1; l > 0; --l) {
        const Pair from = p.delta(pass, l), to = p.delta(pass, l - 1), h = p.output(pass, l - 1);
        const Terms terms{{{from.rows, p.weights(theta, l).columns}}, 1, from.width / 16};
        rows_product<Product>(
            terms, row_tile, to.width, me, [&](int row, int column) { return h.get(row, column); },
            [&](int row, int column, float x0, float x1, float2 at) {
                const float2 x = masked(x0, x1, at);
                to.put(row, column, x.x, x.y);
            });
        me.wait_team();
    }
}

// What becomes of a number of a set of parameters with its gradient x, and of the number kept beside it.
struct Descent {  // theta_{t+1} = theta_t - u, u the velocity
    float lr, momentum;
    __device__ float operator()(float x, float theta, float& velocity) const {
        velocity = momentum * velocity + lr * x;
        return theta - velocity;
    }
};
struct AdjointStep {  // v_{t-1} = lambda_t + mu v_t, with x = H v_t
    float lr, momentum;
    __device__ float operator()(float x, float direction, float& adjoint) const {
        adjoint -= lr * x;
        return adjoint + momentum * direction;
    }
};

template <typename Update>
struct Updated {
    float *from, *to;
    float* kept;  // null: without momentum both updates are from - lr x
    Update update;
};

// Every warp's tiles of weights, updated; operands(l) are those of layer l's gradient, summed over rows.
template <typename Product, int kRows, int kColumns, typename Update, typename Operands>
__device__ void update_tiles(const Problem& p, const Updated<Update>& sets, const Member& me, Operands operands) {
    for (int index = me.rank;; index += me.members) {
        const WeightTile tile = weight_tile(p.net, {kRows, kColumns}, index, me.warp);
        if (tile.layer == p.net.layers) return;
        const Pair old = p.weights(sets.from, tile.layer), updated = p.weights(sets.to, tile.layer);
        float* kept = sets.kept ? p.weights(sets.kept, tile.layer).rows : nullptr;
        if (tile.row >= old.height || tile.column >= old.width) continue;
        product_tiles<Product, false, kRows / 16, kColumns / 8>(
            operands(tile.layer), Span{tile.row / 16, old.height / 16}, Span{tile.column / 8, old.width / 8}, me.lane,
            [&](int row, int column) { return old.get(row, column); },
            [&](int row, int column, float x0, float x1, float2 w) {
                if (!kept) return updated.put(row, column, w.x - p.lr * x0, w.y - p.lr * x1);
                // Not fetched ahead as w is: the registers for that are not there.
                float2* const beside = reinterpret_cast<float2*>(kept + tiled(row, column, old.width));
                float2 held = *beside;
                const float w0 = sets.update(x0, w.x, held.x), w1 = sets.update(x1, w.y, held.y);
                *beside = held;
                updated.put(row, column, w0, w1);
            });
    }
}

template <typename Product, typename Update, typename Operands>
__device__ void update_weights(const Problem& p, const Updated<Update>& sets, const Member& me, Operands operands) {
    if (p.kernel.groups.fine)
        update_tiles<Product, kFine.rows, kFine.columns>(p, sets, me, operands);
    else
        update_tiles<Product, kCoarse.rows, kCoarse.columns>(p, sets, me, operands);
}

// The same of the biases: sums of `delta` over rows, eight features a warp.
template <typename Update>
__device__ void update_biases(const Problem& p, const Updated<Update>& sets, float* pass, const Member& me) {
    const int chunks = p.net.row_tiles();
    int task = 0;
    for (int l = 0; l < p.net.layers; ++l) {
        const Pair delta = p.delta(pass, l);
        for (int first = 0; first < delta.width; first += 8, ++task) {
            if (task % (me.members * kWarps) != me.warp * me.members + me.rank) continue;
            const float* tiles = delta.columns + first / 8 * chunks * 128 + 4 * me.lane;
            float sum = 0;
#pragma unroll 4
            for (int chunk = 0; chunk < chunks; ++chunk) {
                const float4 x = load4(tiles + chunk * 128);
                sum += (x.x + x.y) + (x.z + x.w);
            }
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            const int feature = first + me.lane / 4;
            if (me.lane % 4 == 0) {
                const float old = p.biases(sets.from, l)[feature];
                p.biases(sets.to, l)[feature] =
                    sets.kept ? sets.update(sum, old, p.biases(sets.kept, l)[feature]) : old - p.lr * sum;
            }
        }
    }
}

// One SGD step: the pass at theta, and `next`, the parameters after it. `next` may be theta.
template <typename Product>
__device__ void descend(const Problem& p, float* theta, float* next, float* pass, Member& me) {
    for (int tile = me.team(); tile < p.net.row_tiles(); tile += me.teams()) {
        forward_rows<Product>(p, theta, pass, tile, me);
        backward_rows<Product>(p, theta, pass, tile, me);
    }
    me.wait();
    const Updated<Descent> sets{theta, next, p.momentum != 0 ? p.velocity() : nullptr, {p.lr, p.momentum}};
    update_weights<Product>(p, sets, me, [&](int l) {
        return Terms{{{p.delta(pass, l).columns, p.input(pass, l).columns}}, 1, p.net.row_tiles()};
    });
    update_biases(p, sets, pass, me);
    me.wait();
}

template <typename Product>
__device__ void run_segment(const Problem& p, int64_t segment, Member& me) {
    for (int64_t i = 0; i < p.kernel.plan.steps(segment); ++i)
        descend<Product>(p, p.theta(i), p.theta(i + 1), p.pass(i), me);
}

// Two neighbors of R delta of the output, from its values a and R z, and their shares of the gradients for the actions,
// += alpha c moved, and for alpha, -= c error moved, each element's apart.
__device__ inline void put_tangent(const Problem& p, int row, int column, float2 values, float z0, float z1,
                                   const RowSums& sums) {
    const Pair delta = p.delta(p.tangent(), p.net.layers - 1);
    const int offset = tiled(row, column, delta.width);
    const float a[2] = {values.x, values.y}, z[2] = {z0, z1};
    float moved_delta[2] = {0, 0};
    for (int i = 0; i < 2 && row < p.net.rows; ++i) {
        const float error = head_error(p.head, a[i], p.actions()[offset + i], sums);
        const float moved = head_moved(p.head, a[i], z[i], sums);
        moved_delta[i] = p.scale * head_curvature(p.head, a[i], error, sums) * moved;
        p.base[p.kernel.at.actions_gradient + offset + i] += p.lr * p.scale * moved;
        p.base[p.kernel.at.lr_terms + offset + i] -= p.scale * error * moved;
    }
    delta.put(row, column, moved_delta[0], moved_delta[1]);
}

// The same for a softmax, from R z in place of R h of the output.
__device__ void softmax_tangent_rows(const Problem& p, float* pass, int row_tile, const Member& me) {
    const Pair out = p.output(pass, p.net.layers - 1), moved = p.output(p.tangent(), p.net.layers - 1);
    const auto sums = [&](int row) {
        return tangent_sums(
            p.net.layer[p.net.layers - 1].out, me.lane,
            [&](int column) { return out.rows[tiled(row, column, out.width)]; },
            [&](int column) { return p.actions()[tiled(row, column, out.width)]; },
            [&](int column) { return moved.rows[tiled(row, column, out.width)]; });
    };
    whole_rows(p, row_tile, me, sums, [&](int row, int column, const RowSums& shared) {
        const float2 z = moved.get(row, column);
        put_tangent(p, row, column, out.get(row, column), z.x, z.y, shared);
    });
}

// R h of every layer along v: R z = R h_in W + h_in V + v_b, and R delta of the last.
template <typename Product>
__device__ void tangent_rows(const Problem& p, float* theta, float* pass, int row_tile, const Member& me) {
    struct Fetched {
        float2 bias, h;
    };
    float *v = p.direction(), *tangent = p.tangent();
    for (int l = 0; l < p.net.layers; ++l) {
        const Pair in = p.input(pass, l), moved = p.input(tangent, l), h = p.output(pass, l);
        const Pair out = p.output(tangent, l);
        const float* biases = p.biases(v, l);
        const bool hidden = l + 1 < p.net.layers;
        const Terms terms{{{in.rows, p.weights(v, l).rows}, {moved.rows, p.weights(theta, l).rows}},
                          l == 0 ? 1 : 2,  // the observations do not move
                          in.width / 16};
        rows_product<Product>(
            terms, row_tile, out.width, me,
            [&](int row, int column) {
                return Fetched{*reinterpret_cast<const float2*>(biases + column), h.get(row, column)};
            },
            [&](int row, int column, float x0, float x1, Fetched at) {
                const float z0 = x0 + at.bias.x, z1 = x1 + at.bias.y;
                if (hidden) {
                    const float2 x = masked(z0, z1, at.h);
                    return out.put(row, column, x.x, x.y);
                }
                if (p.head == Head::softmax) return out.put(row, column, z0, z1);
                put_tangent(p, row, column, at.h, z0, z1, {});
            });
        me.wait_team();
    }
    if (p.head == Head::softmax) softmax_tangent_rows(p, pass, row_tile, me);
}

// R delta_{l-1} = m_{l-1} (R delta_l W_l + delta_l V_l); at the observations, unmasked, their gradient.
template <typename Product>
__device__ void adjoint_rows(const Problem& p, float* theta, float* pass, int row_tile, bool want_observations,
                             const Member& me) {
    float *v = p.direction(), *tangent = p.tangent();
    for (int l = p.net.layers - 1; l >= (want_observations ? 0 : 1); --l) {
        const Pair moved = p.delta(tangent, l), from = p.delta(pass, l), h = p.input(pass, l);
        const Terms terms{
            {{moved.rows, p.weights(theta, l).columns}, {from.rows, p.weights(v, l).columns}}, 2, from.width / 16};
        rows_product<Product>(
            terms, row_tile, h.width, me, [&](int row, int column) { return h.get(row, column); },
            [&](int row, int column, float x0, float x1, float2 at) {
                if (l > 0) {
                    const float2 x = masked(x0, x1, at);
                    return p.delta(tangent, l - 1).put(row, column, x.x, x.y);
                }
                float* gradient = p.base + p.kernel.at.observations_gradient + tiled(row, column, h.width);
                gradient[0] -= p.lr * x0;
                gradient[1] -= p.lr * x1;
            });
        me.wait_team();
    }
}

// The tape of the step before on its way to the second-level cache while this one's weights are computed.
__device__ inline void prefetch(const float* data, int64_t floats, const Member& me) {
    for (int64_t i = 32ll * me.thread(); i < floats; i += 32ll * me.threads()) prefetch_l2(data + i);
}

// lambda, and the direction of the step before, with (H v)_l = R delta_l^T h_{l-1} + delta_l^T R h_{l-1}. Without a
// step before, the direction is left at lambda.
template <typename Product>
__device__ void adjoint_step(const Problem& p, int64_t i, bool first, bool want_observations, bool want_params,
                             Member& me) {
    float *theta = p.theta(i), *pass = p.pass(i), *tangent = p.tangent(), *v = p.direction();
    for (int tile = me.team(); tile < p.net.row_tiles(); tile += me.teams()) {
        tangent_rows<Product>(p, theta, pass, tile, me);
        adjoint_rows<Product>(p, theta, pass, tile, want_observations, me);
    }
    if (first && !want_params) return;
    me.wait();
    if (i > 0) {
        prefetch(p.theta(i - 1), p.net.theta, me);
        prefetch(p.pass(i - 1), p.net.pass, me);
    }
    const Updated<AdjointStep> sets{v, v, p.momentum != 0 ? p.adjoint() : nullptr, {p.lr, first ? 0 : p.momentum}};
    update_weights<Product>(p, sets, me, [&](int l) {
        return Terms{{{p.delta(tangent, l).columns, p.input(pass, l).columns},
                      {p.delta(pass, l).columns, p.input(tangent, l).columns}},
                     l == 0 ? 1 : 2,
                     p.net.row_tiles()};
    });
    update_biases(p, sets, tangent, me);
    me.wait();
}

// (height, width) row by row into tiles, zeros where they are padding.
__device__ void pack(const float* from, int height, int width, float* to, int padded_height, int padded_width,
                     const Member& me) {
    for (int i = me.thread(); i < padded_height * padded_width; i += me.threads()) {
        const int row = i / padded_width, column = i % padded_width;
        to[tiled(row, column, padded_width)] =
            row < height && column < width ? from[static_cast<int64_t>(row) * width + column] : 0.0f;
    }
}

__device__ void pack_pair(const float* from, int height, int width, const Pair& to, const Member& me) {
    pack(from, height, width, to.rows, to.height, to.width, me);
    for (int i = me.thread(); i < to.height * to.width; i += me.threads()) {
        const int row = i / to.width, column = i % to.width;
        to.columns[tiled(column, row, to.height)] =
            row < height && column < width ? from[static_cast<int64_t>(row) * width + column] : 0.0f;
    }
}

__device__ void unpack(const float* from, int padded_width, float* to, int height, int width, const Member& me) {
    for (int i = me.thread(); i < height * width; i += me.threads())
        to[i] = from[tiled(i / width, i % width, padded_width)];
}

__device__ void pack_params(const Problem& p, const float* flat, float* theta, const Member& me) {
    for (int l = 0; l < p.net.layers; ++l) {
        const Layer& layer = p.net.layer[l];
        pack_pair(flat + layer.flat, layer.out, layer.in, p.weights(theta, l), me);
        const float* biases = flat + layer.flat + static_cast<int64_t>(layer.out) * layer.in;
        for (int i = me.thread(); i < layer.out_padded; i += me.threads())
            p.biases(theta, l)[i] = i < layer.out ? biases[i] : 0.0f;
    }
}

__device__ void unpack_params(const Problem& p, float* theta, float* flat, const Member& me) {
    for (int l = 0; l < p.net.layers; ++l) {
        const Layer& layer = p.net.layer[l];
        unpack(p.weights(theta, l).rows, layer.in_padded, flat + layer.flat, layer.out, layer.in, me);
        float* biases = flat + layer.flat + static_cast<int64_t>(layer.out) * layer.in;
        for (int i = me.thread(); i < layer.out; i += me.threads()) biases[i] = p.biases(theta, l)[i];
    }
}

__device__ void copy(const float* from, float* to, int64_t floats, Member& me) {
    for (int64_t i = me.thread(); i < floats; i += me.threads()) to[i] = from[i];
    me.wait();
}

__device__ void clear(float* data, int64_t floats, const Member& me) {
    for (int64_t i = me.thread(); i < floats; i += me.threads()) data[i] = 0;
}

template <typename Product>
__device__ void train(const Forward& f, int index, Member& me) {
    const Problem p(f.kernel, index);
    const Network& net = p.net;
    const Plan& plan = f.kernel.plan;
    const int64_t rows = net.rows, in = net.layer[0].in, out = net.layer[net.layers - 1].out;
    pack_pair(f.observations + index * rows * in, net.rows, static_cast<int>(in), p.input(nullptr, 0), me);
    pack(f.actions + index * rows * out, net.rows, static_cast<int>(out), p.actions(), net.rows_padded, net.outputs(),
         me);
    pack_params(p, f.params + index * net.flat, p.theta(0), me);
    clear(p.velocity(), net.theta, me);
    me.wait();
    // Steps that leave no tape overwrite their own parameters.
    for (int64_t step = 0; step < plan.lead_in; ++step) descend<Product>(p, p.theta(0), p.theta(0), p.pass(0), me);
    for (int64_t segment = 0; segment < plan.segments; ++segment) {
        if (segment > 0) copy(p.theta(plan.length), p.theta(0), net.theta, me);
        if (plan.segments > 1) {
            copy(p.theta(0), p.start(segment), net.theta, me);
            copy(p.velocity(), p.start_velocity(segment), net.theta, me);
        }
        run_segment<Product>(p, segment, me);
    }
    const int64_t last = plan.segments > 0 ? plan.steps(plan.segments - 1) : 0;
    unpack_params(p, p.theta(last), f.trained + index * net.flat, me);
}

// The elements' terms of the gradient for alpha, in double and in a fixed order, by one warp.
__device__ void sum_lr_terms(const Problem& p, float* gradient, const Member& me) {
    if (me.rank != 0 || me.warp != 0) return;
    double sum = 0;
    for (int i = me.lane; i < p.net.rows_padded * p.net.outputs(); i += 32) sum += p.base[p.kernel.at.lr_terms + i];
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (me.lane == 0) *gradient = static_cast<float>(sum);
}

template <typename Product>
__device__ void differentiate(const Backward& b, int index, Member& me) {
    const Problem p(b.kernel, index);
    const Network& net = p.net;
    const Layout& at = b.kernel.at;
    const Plan& plan = b.kernel.plan;
    const bool want_observations = b.observations != nullptr, want_params = b.params != nullptr;
    pack_params(p, b.trained + index * net.flat, p.direction(), me);
    pack_params(p, b.trained + index * net.flat, p.adjoint(), me);
    clear(p.base + at.observations_gradient, at.floats - at.observations_gradient, me);
    me.wait();
    int64_t held = b.again ? 0 : plan.segments - 1;  // the segment whose steps are on the tape
    for (int64_t segment = plan.segments - 1; segment >= 0; --segment) {
        if (segment != held) {
            copy(p.start(segment), p.theta(0), net.theta, me);
            copy(p.start_velocity(segment), p.velocity(), net.theta, me);
            run_segment<Product>(p, segment, me);
            held = segment;
        }
        for (int64_t i = plan.steps(segment) - 1; i >= 0; --i)
            adjoint_step<Product>(p, i, segment + i == 0, want_observations, want_params, me);
    }
    me.wait();
    const int64_t rows = net.rows, in = net.layer[0].in, out = net.layer[net.layers - 1].out;
    if (want_params) unpack_params(p, p.direction(), b.params + index * net.flat, me);
    if (want_observations)
        unpack(p.base + at.observations_gradient, net.inputs(), b.observations + index * rows * in, net.rows,
               static_cast<int>(in), me);
    if (b.actions != nullptr)
        unpack(p.base + at.actions_gradient, net.outputs(), b.actions + index * rows * out, net.rows,
               static_cast<int>(out), me);
    sum_lr_terms(p, b.lr_gradient + index, me);
}

template <typename Product>
__global__ void __launch_bounds__(kThreads, 1) unrolled_bc_forward(const __grid_constant__ Forward f) {
    Member me(f.kernel);
    for (int index = blockIdx.x / me.members; index < f.kernel.problems; index += f.kernel.groups.groups)
        train<Product>(f, index, me);
}

template <typename Product>
__global__ void __launch_bounds__(kThreads, 1) unrolled_bc_backward(const __grid_constant__ Backward b) {
    Member me(b.kernel);
    for (int index = blockIdx.x / me.members; index < b.kernel.problems; index += b.kernel.groups.groups)
        differentiate<Product>(b, index, me);
}

Kernel make_kernel(const UnrolledBCParams& params) {
    Kernel kernel{};
    kernel.net = make_network(params);
    kernel.plan = make_plan(params);
    kernel.at = make_layout(kernel.net, kernel.plan);
    kernel.problems = static_cast<int>(params.problems);
    kernel.workspace = static_cast<float*>(params.workspace);
    kernel.counters = reinterpret_cast<unsigned*>(kernel.workspace + params.problems * kernel.at.floats);
    kernel.lr = params.lr;
    kernel.momentum = params.momentum;
    kernel.head = params.head;
    kernel.scale = loss_slope(params.head) / (static_cast<float>(params.rows) *
                                              static_cast<float>(loss_divisor(params.head, params.widths.back())));
    return kernel;
}

template <typename Params>
void run(void (*kernel)(Params), Params params, void* stream) {
    Kernel& k = params.kernel;
    const int resident[] = {resident_blocks(1, kernel, kThreads, 0), resident_blocks(2, kernel, kThreads, 0),
                            resident_blocks(4, kernel, kThreads, 0)};
    k.groups = make_groups(k.problems, k.net, resident);
    set_zero(k.counters, k.groups.groups * kCounterStride * sizeof(unsigned), stream);
    launch_clusters(k.groups.parts, kernel, dim3(k.groups.groups * k.groups.members), dim3(kThreads), 0, stream,
                    params);
}

class Tape final : public UnrolledBCTape {
  public:
    explicit Tape(const UnrolledBCParams& params) : params_(params) {}

    void backward(const UnrolledBCGradients& gradients) override {
        Backward b{};
        b.kernel = make_kernel(params_);
        b.again = std::exchange(again_, true);
        b.trained = gradients.trained;
        b.observations = gradients.observations;
        b.actions = gradients.actions;
        b.params = gradients.params;
        b.lr_gradient = gradients.lr;
        run(params_.ieee ? unrolled_bc_backward<Ieee> : unrolled_bc_backward<Tf32>, b, gradients.stream);
    }

  private:
    const UnrolledBCParams params_;
    bool again_ = false;  // a backward pass has been here
};

}  // namespace
}  // namespace unrolled

size_t unrolled_bc_cuda_workspace(const UnrolledBCParams& params) {
    using namespace unrolled;
    const Layout at = make_layout(make_network(params), make_plan(params));
    return params.problems * (at.floats + kCounterStride) * sizeof(float);
}

std::unique_ptr<UnrolledBCTape> unrolled_bc_cuda(const UnrolledBCParams& params) {
    using namespace unrolled;
    Forward f{};
    f.kernel = make_kernel(params);
    f.observations = params.observations;
    f.actions = params.actions;
    f.params = params.params;
    f.trained = params.trained;
    run(params.ieee ? unrolled_bc_forward<Ieee> : unrolled_bc_forward<Tf32>, f, params.stream);
    if (!params.keep_tape) return nullptr;
    return std::make_unique<Tape>(params);
}

}  // namespace sdw
