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

#include "unrolled_bc_rows.h"
#include "unrolled_bc_weights.h"

namespace sdw {
namespace unrolled {
namespace {

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
    update_weights<Product, 1>(p, sets, me, [&](int l) {
        return Task{{{p.delta(pass, l).columns, p.input(pass, l).columns}, {}}, 1, p.net.row_tiles()};
    });
    me.wait();
}

template <typename Product>
__device__ void run_segment(const Problem& p, int64_t segment, Member& me) {
    for (int64_t i = 0; i < p.kernel.plan.steps(segment); ++i)
        descend<Product>(p, p.theta(i), p.theta(i + 1), p.pass(i), me);
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
    update_weights<Product, 2>(p, sets, me, [&](int l) {
        const Term still{p.delta(tangent, l).columns, p.input(pass, l).columns};
        if (l == 0) return Task{{still, {}}, 1, p.net.row_tiles()};
        return Task{{still, {p.delta(pass, l).columns, p.input(tangent, l).columns}}, 2, p.net.row_tiles()};
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
    for (int i = me.lane; i < p.net.rows_allocated() * p.net.outputs(); i += 32)
        sum += p.base[p.kernel.at.lr_terms + i];
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
