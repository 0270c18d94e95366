// The stage of a step in which every block takes tiles of the weight gradients, over all rows, and updates them.
#pragma once

#include "unrolled_bc_problem.h"

namespace sdw::unrolled {

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
template <typename Product, int kTerms_, typename Update, typename Gradient>
struct WeightTiles {
    static constexpr int kTerms = kTerms_;
    static constexpr bool kLate = false;
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
        const int64_t left = static_cast<int64_t>(tile.row) / kWeightRows * task.chunks * kBlock;
        const int64_t right = static_cast<int64_t>(tile.column) / kColumns * task.chunks * kBlock;
        for (Term& term : task.term) {
            term.left += left;
            term.right += right;
        }
        task.left_sums = tile.column == 0;
        return task;
    }
    __device__ void ready() const {}
    template <typename Load>
    __device__ void late_left(Load) const {}
    __device__ Corner corner() const {
        const Layer& layer = p.net.layer[tile.layer];
        return {tile.row / 16, tile.column / kColumns, layer.out_padded, layer.in_padded};
    }
    __device__ float2 fetch(const Place& place, int) const {
        const int at = corner().in_matrix + place.in_matrix;
        return *reinterpret_cast<const float2*>(p.weights(sets.from, tile.layer).exact + at);
    }
    __device__ float2 finish(const Place& place, int, float x0, float x1, float2 old) const {
        const int at = corner().in_matrix + place.in_matrix;
        float* const beside = sets.kept == nullptr ? nullptr : p.weights(sets.kept, tile.layer).exact + at;
        return sets(p.lr, x0, x1, old, beside);
    }
    __device__ void store(const Place& place, int, float2 w) const {
        const Corner at = corner();
        const Weights to = p.weights(sets.to, tile.layer);
        *reinterpret_cast<float2*>(to.exact + at.in_matrix + place.in_matrix) = w;
        to.put(at, place, make_float2(Product::rounded(w.x), Product::rounded(w.y)));
    }
    __device__ void finish_left(int row, float x) const {
        const int feature = tile.row + row;
        const float old = p.biases(sets.from, tile.layer)[feature];
        p.biases(sets.to, tile.layer)[feature] =
            sets.kept == nullptr ? old - p.lr * x : sets.update(x, old, p.biases(sets.kept, tile.layer)[feature]);
    }
};

template <typename Product, int kTerms, typename Update, typename Gradient>
__device__ void update_weights(const Problem& p, const Updated<Update>& sets, Member& me, const Gradient& gradient) {
    WeightTiles<Product, kTerms, Update, Gradient> tiles(p, sets, gradient, me);
    run_tiles<Product, kWeightRows / 16, 1>(tiles, me.partial, me.half);
}

}  // namespace sdw::unrolled
