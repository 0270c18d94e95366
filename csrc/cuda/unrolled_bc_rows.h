// The stages of a step that take 16 rows through the layers: forward and back, and both of the R-operator pass.
#pragma once

#include "unrolled_bc_problem.h"

namespace sdw::unrolled {

__device__ inline float2 masked(float x0, float x1, float2 h) {
    return make_float2(h.x > 0 ? x0 : 0.0f, h.y > 0 ? x1 : 0.0f);
}

// Delta at two neighbors of the output, zero in rows of padding; `at` is their place in its tiles, where they are
// stored.
__device__ inline float2 output_delta(const Problem& p, float* pass, int row, int at, float z0, float z1,
                                      const RowSums& sums) {
    const float2 y = *reinterpret_cast<const float2*>(p.actions() + at);
    const float scale = row < p.net.rows ? p.scale : 0.0f;
    const float a0 = head_output(p.head, z0, sums), a1 = head_output(p.head, z1, sums);
    *reinterpret_cast<float2*>(p.output(pass, p.net.layers - 1).rows + at) = make_float2(a0, a1);
    return make_float2(head_delta(p.head, scale * head_error(p.head, a0, y.x, sums), a0),
                       head_delta(p.head, scale * head_error(p.head, a1, y.y, sums), a1));
}

// R delta there, from its values a and R z. Adds their shares of the gradients for the actions, alpha c moved, and for
// alpha, - c error moved, each element's apart.
__device__ inline float2 tangent_delta(const Problem& p, int row, int at, float2 values, float z0, float z1,
                                       const RowSums& sums) {
    const float a[2] = {values.x, values.y}, z[2] = {z0, z1};
    float moved_delta[2] = {0, 0};
    for (int i = 0; i < 2 && row < p.net.rows; ++i) {
        const float error = head_error(p.head, a[i], p.actions()[at + i], sums);
        const float moved = head_moved(p.head, a[i], z[i], sums);
        moved_delta[i] = p.scale * head_curvature(p.head, a[i], error, sums) * moved;
        p.base[p.kernel.at.actions_gradient + at + i] += p.lr * p.scale * moved;
        p.base[p.kernel.at.lr_terms + at + i] -= p.scale * error * moved;
    }
    return make_float2(moved_delta[0], moved_delta[1]);
}

// Two neighbors of a pass that are an operand from now on, rounded; they go to the strips of the team where the next
// product reads them.
template <typename Product>
__device__ float2 pass_on(const Place& place, int group, float x0, float x1, bool sends, const Member& me) {
    x0 = Product::rounded(x0);
    x1 = Product::rounded(x1);
    if (sends) me.send_part(2 * group * kStripBlock + place.on_strip, x0, x1);
    return make_float2(x0, x1);
}

// The same by a thread alone, and to memory.
template <typename Product>
__device__ void scatter_on(const Pair& to, int row, int column, float2 x, bool sends, const Member& me) {
    x = make_float2(Product::rounded(x.x), Product::rounded(x.y));
    const int i = row % 16;
    if (sends) me.send(column / 16 * kStripBlock + i / 8 * 128 + i % 8 * 16 + column % 16, x.x, x.y);
    to.scatter(row, column, x.x, x.y);
}

// A softmax needs its whole row, which the columns' owners do not have: body(row, column, sums(row)) for every pair of
// neighbors of a tile of the output, a warp a row, after the team has met.
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

// From z in place of the output.
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
        const int at = tiled(row, column, out.width);  // e^z is 0 in columns of padding
        const float2 delta = output_delta(p, pass, row, at, column < columns ? out.rows[at] : -INFINITY,
                                          column + 1 < columns ? out.rows[at + 1] : -INFINITY, shared);
        scatter_on<Product>(p.delta(pass, p.net.layers - 1), row, column, delta, p.net.layers > 1, me);
    });
}

// From R z in place of R h of the output.
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
        const int at = tiled(row, column, out.width);
        const float2 delta = tangent_delta(p, row, at, make_float2(out.rows[at], out.rows[at + 1]), moved.rows[at],
                                           moved.rows[at + 1], shared);
        scatter_on<Product>(p.delta(p.tangent(), p.net.layers - 1), row, column, delta, sends, me);
    });
}

// What all stages have; layers begin, begin + step, ... up to end.
struct Stage {
    const Problem& p;
    float *theta, *pass;
    int row_tile, begin, end;

    __device__ Corner corner(int group, int width) const { return p.corner(row_tile, group, width); }
};

// h of every layer, and delta of the last.
template <typename Product>
struct ForwardRows : Stage {
    static constexpr int step = 1, kTerms = 1, kGroups = 2;

    __device__ ForwardRows(const Problem& p_, float* theta_, float* pass_, int row_tile_)
        : Stage{p_, theta_, pass_, row_tile_, 0, p_.net.layers} {}

    __device__ int columns(int l) const { return p.net.layer[l].out_padded; }
    __device__ bool receives(int l) const { return l > 0; }
    __device__ bool sends(int) const { return end > 1; }
    __device__ const float* left(int l) const { return p.input(pass, l).row_tile(row_tile); }
    __device__ Task task(int l) const {
        const Pair in = p.input(pass, l);
        return {{{in.row_tile(row_tile), p.weights(theta, l).rows}, {}}, 1, in.width / 16};
    }
    __device__ float2 fetch(int l, int group, const Place& place) const {
        return *reinterpret_cast<const float2*>(p.biases(theta, l) + kColumns * group + place.column);
    }
    __device__ float2 finish(int l, int group, const Place& place, float x0, float x1, float2 bias,
                             const Member& me) const {
        const float z0 = x0 + bias.x, z1 = x1 + bias.y;
        if (l + 1 < end)  // NaN stays
            return pass_on<Product>(place, group, z0 < 0 ? 0 : z0, z1 < 0 ? 0 : z1, true, me);
        if (p.head == Head::softmax) return make_float2(z0, z1);
        const int at = corner(group, columns(l)).in_matrix + place.in_matrix;
        const float2 delta = output_delta(p, pass, 16 * row_tile + place.row, at, z0, z1, {});
        return pass_on<Product>(place, group, delta.x, delta.y, end > 1, me);
    }
    __device__ void store(int l, int group, const Place& place, float2 x) const {
        const Corner at = corner(group, columns(l));
        if (l + 1 < end) return p.output(pass, l).put(at, place, x);
        if (p.head == Head::softmax) return p.output(pass, l).put_rows(at, place, x);
        p.delta(pass, l).put(at, place, x);
    }
};

// delta_{l-1} = m_{l-1} (delta_l W_l)
template <typename Product>
struct BackwardRows : Stage {
    static constexpr int step = -1, kTerms = 1, kGroups = 2;

    __device__ BackwardRows(const Problem& p_, float* theta_, float* pass_, int row_tile_)
        : Stage{p_, theta_, pass_, row_tile_, p_.net.layers - 1, 0} {}

    __device__ int columns(int l) const { return p.net.layer[l].in_padded; }
    __device__ bool receives(int) const { return true; }
    __device__ bool sends(int l) const { return l > 1; }
    __device__ const float* left(int l) const { return p.delta(pass, l).row_tile(row_tile); }
    __device__ Task task(int l) const {
        return {{{nullptr, p.weights(theta, l).columns}, {}}, 1, p.net.layer[l].out_padded / 16};
    }
    __device__ float2 fetch(int l, int group, const Place& place) const {
        return p.output(pass, l - 1).get(corner(group, columns(l)), place);
    }
    __device__ float2 finish(int l, int group, const Place& place, float x0, float x1, float2 h,
                             const Member& me) const {
        const float2 x = masked(x0, x1, h);
        return pass_on<Product>(place, group, x.x, x.y, sends(l), me);
    }
    __device__ void store(int l, int group, const Place& place, float2 x) const {
        p.delta(pass, l - 1).put(corner(group, columns(l)), place, x);
    }
};

// R h of every layer along v: R z = R h_in W + h_in V + v_b, and R delta of the last.
template <typename Product>
struct TangentRows : Stage {
    struct Fetched {
        float2 bias, h;
    };
    static constexpr int step = 1, kTerms = 2, kGroups = 1;
    const bool last_sends;

    __device__ TangentRows(const Problem& p_, float* theta_, float* pass_, int row_tile_, bool last_sends_)
        : Stage{p_, theta_, pass_, row_tile_, 0, p_.net.layers}, last_sends(last_sends_) {}

    __device__ int columns(int l) const { return p.net.layer[l].out_padded; }
    __device__ bool receives(int l) const { return l > 0; }
    __device__ bool sends(int l) const { return l + 1 < end || last_sends; }
    __device__ const float* left(int l) const { return p.input(p.tangent(), l).row_tile(row_tile); }
    __device__ Task task(int l) const {
        const Pair in = p.input(pass, l);
        const Term still{in.row_tile(row_tile), p.weights(p.direction(), l).rows};
        if (l == 0) return {{still, {}}, 1, in.width / 16};  // the observations do not move
        return {{{nullptr, p.weights(theta, l).rows}, still}, 2, in.width / 16};
    }
    __device__ Fetched fetch(int l, int group, const Place& place) const {
        return {*reinterpret_cast<const float2*>(p.biases(p.direction(), l) + kColumns * group + place.column),
                p.output(pass, l).get(corner(group, columns(l)), place)};
    }
    __device__ float2 finish(int l, int group, const Place& place, float x0, float x1, const Fetched& fetched,
                             const Member& me) const {
        const float z0 = x0 + fetched.bias.x, z1 = x1 + fetched.bias.y;
        if (l + 1 < end) {
            const float2 x = masked(z0, z1, fetched.h);
            return pass_on<Product>(place, group, x.x, x.y, true, me);
        }
        if (p.head == Head::softmax) return make_float2(z0, z1);
        const int at = corner(group, columns(l)).in_matrix + place.in_matrix;
        const float2 delta = tangent_delta(p, 16 * row_tile + place.row, at, fetched.h, z0, z1, {});
        return pass_on<Product>(place, group, delta.x, delta.y, last_sends, me);
    }
    __device__ void store(int l, int group, const Place& place, float2 x) const {
        const Corner at = corner(group, columns(l));
        if (l + 1 < end) return p.output(p.tangent(), l).put(at, place, x);
        if (p.head == Head::softmax) return p.output(p.tangent(), l).put_rows(at, place, x);
        p.delta(p.tangent(), l).put(at, place, x);
    }
};

// R delta_{l-1} = m_{l-1} (R delta_l W_l + delta_l V_l); at the observations, unmasked, their gradient.
template <typename Product>
struct AdjointRows : Stage {
    static constexpr int step = -1, kTerms = 2, kGroups = 1;

    __device__ AdjointRows(const Problem& p_, float* theta_, float* pass_, int row_tile_, bool want_observations)
        : Stage{p_, theta_, pass_, row_tile_, p_.net.layers - 1, want_observations ? -1 : 0} {}

    __device__ int columns(int l) const { return p.net.layer[l].in_padded; }
    __device__ bool receives(int) const { return true; }
    __device__ bool sends(int l) const { return l - 1 > end; }
    __device__ const float* left(int l) const { return p.delta(p.tangent(), l).row_tile(row_tile); }
    __device__ Task task(int l) const {
        const Pair from = p.delta(pass, l);
        const Term still{from.row_tile(row_tile), p.weights(p.direction(), l).columns};
        return {{{nullptr, p.weights(theta, l).columns}, still}, 2, from.width / 16};
    }
    __device__ float2 fetch(int l, int group, const Place& place) const {
        return p.input(pass, l).get(corner(group, columns(l)), place);
    }
    __device__ float2 finish(int l, int group, const Place& place, float x0, float x1, float2 h,
                             const Member& me) const {
        if (l == 0) return make_float2(x0, x1);
        const float2 x = masked(x0, x1, h);
        return pass_on<Product>(place, group, x.x, x.y, sends(l), me);
    }
    __device__ void store(int l, int group, const Place& place, float2 x) const {
        const Corner at = corner(group, columns(l));
        if (l > 0) return p.delta(p.tangent(), l - 1).put(at, place, x);
        float* gradient = p.base + p.kernel.at.observations_gradient + at.in_matrix + place.in_matrix;
        gradient[0] -= p.lr * x.x;
        gradient[1] -= p.lr * x.y;
    }
};

}  // namespace sdw::unrolled
