// Behavior cloning unrolled, and its adjoint, on CUDA: one persistent kernel a pass.
//
//     u_{t+1}  = mu u_t + alpha g_t,  theta_{t+1} = theta_t - u_{t+1}
//     lambda_t = lambda_{t+1} - alpha (Hessian at theta_t) v_t,  v_t = lambda_{t+1} + mu v_{t+1}
//
// with g_t the gradient of the head's mean loss (sdw/head.h) and momentum mu. Without momentum u is nothing to remember
// and v is lambda: no step reads or writes either.
//
// A problem is run by a group of blocks. A step is two stages with a barrier of the group after each: a team of blocks
// takes its 16 rows through all layers and back (team.h); then every block takes tiles of the weight gradients over all
// rows, with the update in their epilogue. A tile has one owner and a fixed order of summation (product.h): the
// result's bits do not depend on the number of blocks. Groups never wait for each other. Operands come from the
// second-level cache, where a step's 1.7 MB of weights and 3.2 MB of activations stay; README.md has the arithmetic.
#include <memory>
#include <utility>

#include "head.h"
#include "team.h"

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
    int strip;           // floats of a strip of rows in shared memory, 0 where it does not fit
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

// Of an 8 x 8 part of a matrix, of which a lane has row g, columns 2t and 2t + 1: column g, rows 2t and 2t + 1.
__device__ inline float2 transposed(float x0, float x1) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int source = lane % 4 * 8 + lane / 8;  // has row 2t, of which column g is its first or second number
    const bool odd = lane / 4 % 2 != 0;
    const float even0 = __shfl_sync(0xffffffffu, x0, source), even1 = __shfl_sync(0xffffffffu, x1, source);
    const float odd0 = __shfl_sync(0xffffffffu, x0, source + 4), odd1 = __shfl_sync(0xffffffffu, x1, source + 4);
    return odd ? make_float2(even1, odd1) : make_float2(even0, odd0);
}

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
    __device__ void put_row(int row, int column, float x0, float x1) const {
        *reinterpret_cast<float2*>(rows + tiled(row, column, width)) = make_float2(x0, x1);
    }
    // By a warp for an 8 x 8 part, which the lanes have as run_tiles() gives it: whole sectors of both.
    __device__ void put(int row, int column, float x0, float x1) const {
        put_row(row, column, x0, x1);
        const int g = row % 8, t = column % 8 / 2;
        *reinterpret_cast<float2*>(columns + tiled(column - 2 * t + g, row - g + 2 * t, height)) = transposed(x0, x1);
    }
    // By a thread alone.
    __device__ void scatter(int row, int column, float x0, float x1) const {
        put_row(row, column, x0, x1);
        columns[tiled(column, row, height)] = x0;
        columns[tiled(column + 1, row, height)] = x1;
    }
};

// Weights: operands as above, and the same in full precision.
struct Weights : Pair {
    float* exact;  // (height, width)

    __device__ Weights(float* data, int height_, int width_)
        : Pair(data, height_, width_), exact(data + 2ll * height_ * width_) {}
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
    __device__ Weights weights(float* theta, int l) const {
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

__device__ inline float2 masked(float x0, float x1, float2 h) {
    return make_float2(h.x > 0 ? x0 : 0.0f, h.y > 0 ? x1 : 0.0f);
}

// Two neighbors of the output as they are stored, and delta there, zero in rows of padding.
__device__ inline float2 output_delta(const Problem& p, float* pass, int row, int column, float z0, float z1,
                                      const RowSums& sums) {
    const Pair out = p.output(pass, p.net.layers - 1);
    const float2 y = *reinterpret_cast<const float2*>(p.actions() + tiled(row, column, out.width));
    const float scale = row < p.net.rows ? p.scale : 0.0f;
    const float a0 = head_output(p.head, z0, sums), a1 = head_output(p.head, z1, sums);
    out.put_row(row, column, a0, a1);
    return make_float2(head_delta(p.head, scale * head_error(p.head, a0, y.x, sums), a0),
                       head_delta(p.head, scale * head_error(p.head, a1, y.y, sums), a1));
}

// Rows of a pass that are operands from now on: to memory, and to the strip of the team where the next product reads
// it.
template <typename Product>
__device__ void pass_on(const Pair& to, int row, int column, float x0, float x1, bool sends, const Member& me) {
    x0 = Product::rounded(x0);
    x1 = Product::rounded(x1);
    if (sends) me.send(row % 16, column, to.width, x0, x1);
    to.put(row, column, x0, x1);
}

// body(row, column, sums(row)) for every pair of neighbors of a tile of the output, a warp a row.
template <typename Sums, typename Body>
__device__ void whole_rows(const Problem& p, int row_tile, const Member& me, Sums sums, Body body) {
    me.wait_team();
    const int width = p.net.outputs();
    for (int i = me.part * kWarps + me.warp; i < 16; i += kWarps * me.parts) {
        const int row = 16 * row_tile + i;
        const RowSums shared = sums(row);
        for (int column = 2 * me.lane; column < width; column += 64) body(row, column, shared);
    }
}

// The same as pass_on(), by a thread alone.
template <typename Product>
__device__ void scatter_on(const Pair& to, int row, int column, float x0, float x1, bool sends, const Member& me) {
    x0 = Product::rounded(x0);
    x1 = Product::rounded(x1);
    if (sends) me.send(row % 16, column, to.width, x0, x1);
    to.scatter(row, column, x0, x1);
}

// From z in place of the output: a softmax needs its whole row, which the columns' owners do not have.
template <typename Product>
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
        const float2 delta = output_delta(p, pass, row, column, column < columns ? z.x : -INFINITY,
                                          column + 1 < columns ? z.y : -INFINITY, shared);
        scatter_on<Product>(p.delta(pass, p.net.layers - 1), row, column, delta.x, delta.y, p.net.layers > 1, me);
    });
}

// h of every layer, and delta of the last.
template <typename Product>
struct ForwardRows {
    static constexpr int step = 1;
    const Problem& p;
    float *theta, *pass;
    int row_tile, begin, end;

    __device__ ForwardRows(const Problem& p_, float* theta_, float* pass_, int row_tile_)
        : p(p_), theta(theta_), pass(pass_), row_tile(row_tile_), begin(0), end(p_.net.layers) {}

    __device__ int columns(int l) const { return p.net.layer[l].out_padded; }
    __device__ bool receives(int l) const { return l > 0; }
    __device__ bool sends(int) const { return end > 1; }
    __device__ const float* left(int l) const { return tile_of(p.input(pass, l)); }
    __device__ const float* tile_of(const Pair& matrix) const { return matrix.rows + 16ll * row_tile * matrix.width; }
    __device__ Task task(int l) const {
        const Pair in = p.input(pass, l);
        return {{{tile_of(in), p.weights(theta, l).rows}, {}}, 1, in.width / 16, 0, 0, false, false};
    }
    __device__ float2 fetch(int l, int, int column) const {
        return *reinterpret_cast<const float2*>(p.biases(theta, l) + column);
    }
    __device__ void finish(int l, int i, int column, float x0, float x1, float2 bias, const Member& me) const {
        const int row = 16 * row_tile + i;
        const float z0 = x0 + bias.x, z1 = x1 + bias.y;
        if (l + 1 < end)  // NaN stays
            return pass_on<Product>(p.output(pass, l), row, column, z0 < 0 ? 0 : z0, z1 < 0 ? 0 : z1, true, me);
        if (p.head == Head::softmax) return p.output(pass, l).put_row(row, column, z0, z1);
        const float2 delta = output_delta(p, pass, row, column, z0, z1, {});
        pass_on<Product>(p.delta(pass, l), row, column, delta.x, delta.y, end > 1, me);
    }
};

// delta_{l-1} = m_{l-1} (delta_l W_l)
template <typename Product>
struct BackwardRows {
    static constexpr int step = -1;
    const Problem& p;
    float *theta, *pass;
    int row_tile, begin, end;

    __device__ BackwardRows(const Problem& p_, float* theta_, float* pass_, int row_tile_)
        : p(p_), theta(theta_), pass(pass_), row_tile(row_tile_), begin(p_.net.layers - 1), end(0) {}

    __device__ int columns(int l) const { return p.net.layer[l].in_padded; }
    __device__ bool receives(int) const { return true; }
    __device__ bool sends(int l) const { return l > 1; }
    __device__ const float* left(int l) const {
        const Pair from = p.delta(pass, l);
        return from.rows + 16ll * row_tile * from.width;
    }
    __device__ Task task(int l) const {
        return {{{nullptr, p.weights(theta, l).columns}, {}}, 1, p.net.layer[l].out_padded / 16, 0, 0, false, false};
    }
    __device__ float2 fetch(int l, int i, int column) const {
        return p.output(pass, l - 1).get(16 * row_tile + i, column);
    }
    __device__ void finish(int l, int i, int column, float x0, float x1, float2 h, const Member& me) const {
        const float2 x = masked(x0, x1, h);
        pass_on<Product>(p.delta(pass, l - 1), 16 * row_tile + i, column, x.x, x.y, sends(l), me);
    }
};

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

    __device__ float2 operator()(float lr, float x0, float x1, float2 old, float* beside) const {
        if (kept == nullptr) return make_float2(old.x - lr * x0, old.y - lr * x1);
        return make_float2(update(x0, old.x, beside[0]), update(x1, old.y, beside[1]));
    }
};

// This block's tiles of weights and their biases, updated. gradient(l) has the operands of layer l's gradient for W,
// summed over rows; the gradient for b is the sum of its first left operand.
template <typename Product, typename Update, typename Gradient>
struct WeightTiles {
    const Problem& p;
    const Updated<Update>& sets;
    const Gradient& gradient;
    int index, members;
    WeightTile tile;

    __device__ WeightTiles(const Problem& p_, const Updated<Update>& sets_, const Gradient& gradient_, const Member& me)
        : p(p_),
          sets(sets_),
          gradient(gradient_),
          index(me.rank),
          members(me.members),
          tile(weight_tile(p_.net, index)) {}

    __device__ bool valid() const { return tile.layer != p.net.layers; }
    __device__ void advance() { tile = weight_tile(p.net, index += members); }
    __device__ Task task() const {
        Task task = gradient(tile.layer);
        for (Term& term : task.term) {
            term.left += static_cast<int64_t>(tile.row) / 8 * task.chunks * 128;
            term.right += static_cast<int64_t>(tile.column) / 8 * task.chunks * 128;
        }
        task.left_tiles = (p.net.layer[tile.layer].out_padded - tile.row) / 16;
        task.right_tiles = (p.net.layer[tile.layer].in_padded - tile.column) / 8;
        task.left_sums = tile.column == 0;
        return task;
    }
    __device__ void ready() const {}
    __device__ const float* late_left() const { return nullptr; }
    __device__ int64_t offset(Place at) const {
        return tiled(tile.row + at.row, tile.column + at.column, p.net.layer[tile.layer].in_padded);
    }
    __device__ float2 fetch(Place at) const {
        return *reinterpret_cast<const float2*>(p.weights(sets.from, tile.layer).exact + offset(at));
    }
    __device__ void finish(Place at, float x0, float x1, float2 old) const {
        const Weights to = p.weights(sets.to, tile.layer);
        float* const beside = sets.kept == nullptr ? nullptr : p.weights(sets.kept, tile.layer).exact + offset(at);
        const float2 w = sets(p.lr, x0, x1, old, beside);
        *reinterpret_cast<float2*>(to.exact + offset(at)) = w;
        to.put(tile.row + at.row, tile.column + at.column, Product::rounded(w.x), Product::rounded(w.y));
    }
    __device__ void finish_left(int row, float x) const {
        const int feature = tile.row + row;
        const float old = p.biases(sets.from, tile.layer)[feature];
        p.biases(sets.to, tile.layer)[feature] =
            sets.kept == nullptr ? old - p.lr * x : sets.update(x, old, p.biases(sets.kept, tile.layer)[feature]);
    }
};

template <typename Product, typename Update, typename Gradient>
__device__ void update_weights(const Problem& p, const Updated<Update>& sets, Member& me, const Gradient& gradient) {
    WeightTiles<Product, Update, Gradient> tiles(p, sets, gradient, me);
    run_tiles<Product, kWeightRows / 16>(tiles, me.partial, me.half);
}

// One SGD step: the pass at theta, and `next`, the parameters after it. `next` may be theta.
template <typename Product>
__device__ void descend(const Problem& p, float* theta, float* next, float* pass, Member& me) {
    for (int tile = me.team(); tile < p.net.row_tiles(); tile += me.teams()) {
        run_stage<Product>(ForwardRows<Product>(p, theta, pass, tile), me);
        if (p.head == Head::softmax) softmax_rows<Product>(p, pass, tile, me);
        run_stage<Product>(BackwardRows<Product>(p, theta, pass, tile), me);
    }
    me.wait();
    const Updated<Descent> sets{theta, next, p.momentum != 0 ? p.velocity() : nullptr, {p.lr, p.momentum}};
    update_weights<Product>(p, sets, me, [&](int l) {
        return Task{
            {{p.delta(pass, l).columns, p.input(pass, l).columns}, {}}, 1, p.net.row_tiles(), 0, 0, false, false};
    });
    me.wait();
}

template <typename Product>
__device__ void run_segment(const Problem& p, int64_t segment, Member& me) {
    for (int64_t i = 0; i < p.kernel.plan.steps(segment); ++i)
        descend<Product>(p, p.theta(i), p.theta(i + 1), p.pass(i), me);
}

// Two neighbors of R delta of the output, from its values a and R z; adds their shares of the gradients for the
// actions, alpha c moved, and for alpha, - c error moved, each element's apart.
__device__ inline float2 tangent_delta(const Problem& p, int row, int column, float2 values, float z0, float z1,
                                       const RowSums& sums) {
    const int offset = tiled(row, column, p.net.outputs());
    const float a[2] = {values.x, values.y}, z[2] = {z0, z1};
    float moved_delta[2] = {0, 0};
    for (int i = 0; i < 2 && row < p.net.rows; ++i) {
        const float error = head_error(p.head, a[i], p.actions()[offset + i], sums);
        const float moved = head_moved(p.head, a[i], z[i], sums);
        moved_delta[i] = p.scale * head_curvature(p.head, a[i], error, sums) * moved;
        p.base[p.kernel.at.actions_gradient + offset + i] += p.lr * p.scale * moved;
        p.base[p.kernel.at.lr_terms + offset + i] -= p.scale * error * moved;
    }
    return make_float2(moved_delta[0], moved_delta[1]);
}

// The same for a softmax, from R z in place of R h of the output.
template <typename Product>
__device__ void softmax_tangent_rows(const Problem& p, float* pass, int row_tile, bool sends, const Member& me) {
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
        const float2 delta = tangent_delta(p, row, column, out.get(row, column), z.x, z.y, shared);
        scatter_on<Product>(p.delta(p.tangent(), p.net.layers - 1), row, column, delta.x, delta.y, sends, me);
    });
}

// R h of every layer along v: R z = R h_in W + h_in V + v_b, and R delta of the last.
template <typename Product>
struct TangentRows {
    struct Fetched {
        float2 bias, h;
    };
    static constexpr int step = 1;
    const Problem& p;
    float *theta, *pass;
    int row_tile;
    bool last_sends;
    int begin, end;

    __device__ TangentRows(const Problem& p_, float* theta_, float* pass_, int row_tile_, bool last_sends_)
        : p(p_),
          theta(theta_),
          pass(pass_),
          row_tile(row_tile_),
          last_sends(last_sends_),
          begin(0),
          end(p_.net.layers) {}

    __device__ int columns(int l) const { return p.net.layer[l].out_padded; }
    __device__ bool receives(int l) const { return l > 0; }
    __device__ bool sends(int l) const { return l + 1 < end || last_sends; }
    __device__ const float* tile_of(const Pair& matrix) const { return matrix.rows + 16ll * row_tile * matrix.width; }
    __device__ const float* left(int l) const { return tile_of(p.input(p.tangent(), l)); }
    __device__ Task task(int l) const {
        const Pair in = p.input(pass, l);
        const Term still{tile_of(in), p.weights(p.direction(), l).rows};
        if (l == 0) return {{still, {}}, 1, in.width / 16, 0, 0, false, false};  // the observations do not move
        return {{{nullptr, p.weights(theta, l).rows}, still}, 2, in.width / 16, 0, 0, false, false};
    }
    __device__ Fetched fetch(int l, int i, int column) const {
        return {*reinterpret_cast<const float2*>(p.biases(p.direction(), l) + column),
                p.output(pass, l).get(16 * row_tile + i, column)};
    }
    __device__ void finish(int l, int i, int column, float x0, float x1, const Fetched& at, const Member& me) const {
        const int row = 16 * row_tile + i;
        const float z0 = x0 + at.bias.x, z1 = x1 + at.bias.y;
        const Pair out = p.output(p.tangent(), l);
        if (l + 1 < end) {
            const float2 x = masked(z0, z1, at.h);
            return pass_on<Product>(out, row, column, x.x, x.y, true, me);
        }
        if (p.head == Head::softmax) return out.put_row(row, column, z0, z1);
        const float2 delta = tangent_delta(p, row, column, at.h, z0, z1, {});
        pass_on<Product>(p.delta(p.tangent(), l), row, column, delta.x, delta.y, last_sends, me);
    }
};

// R delta_{l-1} = m_{l-1} (R delta_l W_l + delta_l V_l); at the observations, unmasked, their gradient.
template <typename Product>
struct AdjointRows {
    static constexpr int step = -1;
    const Problem& p;
    float *theta, *pass;
    int row_tile, begin, end;

    __device__ AdjointRows(const Problem& p_, float* theta_, float* pass_, int row_tile_, bool want_observations)
        : p(p_),
          theta(theta_),
          pass(pass_),
          row_tile(row_tile_),
          begin(p_.net.layers - 1),
          end(want_observations ? -1 : 0) {}

    __device__ int columns(int l) const { return p.net.layer[l].in_padded; }
    __device__ bool receives(int) const { return true; }
    __device__ bool sends(int l) const { return l - 1 > end; }
    __device__ const float* tile_of(const Pair& matrix) const { return matrix.rows + 16ll * row_tile * matrix.width; }
    __device__ const float* left(int l) const { return tile_of(p.delta(p.tangent(), l)); }
    __device__ Task task(int l) const {
        const Pair from = p.delta(pass, l);
        return {{{nullptr, p.weights(theta, l).columns}, {tile_of(from), p.weights(p.direction(), l).columns}},
                2,
                from.width / 16,
                0,
                0,
                false,
                false};
    }
    __device__ float2 fetch(int l, int i, int column) const { return p.input(pass, l).get(16 * row_tile + i, column); }
    __device__ void finish(int l, int i, int column, float x0, float x1, float2 h, const Member& me) const {
        const int row = 16 * row_tile + i;
        if (l > 0) {
            const float2 x = masked(x0, x1, h);
            return pass_on<Product>(p.delta(p.tangent(), l - 1), row, column, x.x, x.y, sends(l), me);
        }
        float* gradient = p.base + p.kernel.at.observations_gradient + tiled(row, column, p.net.inputs());
        gradient[0] -= p.lr * x0;
        gradient[1] -= p.lr * x1;
    }
};

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
        const bool goes_back = want_observations || p.net.layers > 1;
        run_stage<Product>(TangentRows<Product>(p, theta, pass, tile, goes_back), me);
        if (p.head == Head::softmax) softmax_tangent_rows<Product>(p, pass, tile, goes_back, me);
        run_stage<Product>(AdjointRows<Product>(p, theta, pass, tile, want_observations), me);
    }
    if (first && !want_params) return;
    me.wait();
    if (i > 0) {
        prefetch(p.theta(i - 1), p.net.theta, me);
        prefetch(p.pass(i - 1), p.net.pass, me);
    }
    const Updated<AdjointStep> sets{v, v, p.momentum != 0 ? p.adjoint() : nullptr, {p.lr, first ? 0 : p.momentum}};
    update_weights<Product>(p, sets, me, [&](int l) {
        return Task{{{p.delta(tangent, l).columns, p.input(pass, l).columns},
                     {p.delta(pass, l).columns, p.input(tangent, l).columns}},
                    l == 0 ? 1 : 2,
                    p.net.row_tiles(),
                    0,
                    0,
                    false,
                    false};
    });
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

// The same rounded, and its transpose.
template <typename Product>
__device__ void pack_pair(const float* from, int height, int width, const Pair& to, const Member& me) {
    for (int i = me.thread(); i < to.height * to.width; i += me.threads()) {
        const int row = i / to.width, column = i % to.width;
        const float x =
            row < height && column < width ? Product::rounded(from[static_cast<int64_t>(row) * width + column]) : 0.0f;
        to.rows[tiled(row, column, to.width)] = x;
        to.columns[tiled(column, row, to.height)] = x;
    }
}

__device__ void unpack(const float* from, int padded_width, float* to, int height, int width, const Member& me) {
    for (int i = me.thread(); i < height * width; i += me.threads())
        to[i] = from[tiled(i / width, i % width, padded_width)];
}

template <typename Product>
__device__ void pack_params(const Problem& p, const float* flat, float* theta, const Member& me) {
    for (int l = 0; l < p.net.layers; ++l) {
        const Layer& layer = p.net.layer[l];
        const Weights to = p.weights(theta, l);
        pack_pair<Product>(flat + layer.flat, layer.out, layer.in, to, me);
        pack(flat + layer.flat, layer.out, layer.in, to.exact, to.height, to.width, me);
        const float* biases = flat + layer.flat + static_cast<int64_t>(layer.out) * layer.in;
        for (int i = me.thread(); i < layer.out_padded; i += me.threads())
            p.biases(theta, l)[i] = i < layer.out ? biases[i] : 0.0f;
    }
}

__device__ void unpack_params(const Problem& p, float* theta, float* flat, const Member& me) {
    for (int l = 0; l < p.net.layers; ++l) {
        const Layer& layer = p.net.layer[l];
        unpack(p.weights(theta, l).exact, layer.in_padded, flat + layer.flat, layer.out, layer.in, me);
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
    pack_pair<Product>(f.observations + index * rows * in, net.rows, static_cast<int>(in), p.input(nullptr, 0), me);
    pack(f.actions + index * rows * out, net.rows, static_cast<int>(out), p.actions(), net.rows_padded, net.outputs(),
         me);
    pack_params<Product>(p, f.params + index * net.flat, p.theta(0), me);
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
    pack_params<Product>(p, b.trained + index * net.flat, p.direction(), me);
    pack_params<Product>(p, b.trained + index * net.flat, p.adjoint(), me);
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
    Member me(f.kernel.groups, f.kernel.counters, f.kernel.strip);
    for (int index = blockIdx.x / me.members; index < f.kernel.problems; index += f.kernel.groups.groups)
        train<Product>(f, index, me);
}

template <typename Product>
__global__ void __launch_bounds__(kThreads, 1) unrolled_bc_backward(const __grid_constant__ Backward b) {
    Member me(b.kernel.groups, b.kernel.counters, b.kernel.strip);
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
    const size_t strip = shared_bytes(strip_floats(k.net)) <= shared_limit() ? strip_floats(k.net) : 0;
    const size_t shared = shared_bytes(strip);
    k.strip = static_cast<int>(strip);
    int resident[4];
    for (int i = 0; i < 4; ++i) resident[i] = resident_blocks(1 << i, kernel, kThreads, shared);
    k.groups = make_groups(k.problems, k.net, resident);
    set_zero(k.counters, k.groups.groups * kCounterStride * sizeof(unsigned), stream);
    launch_clusters(k.groups.parts, kernel, dim3(k.groups.groups * k.groups.members), dim3(kThreads), shared, stream,
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
