// Behavior cloning unrolled, and its adjoint.
//
//     u_{t+1}  = mu u_t + alpha g_t,  theta_{t+1} = theta_t - u_{t+1}
//     lambda_t = lambda_{t+1} - alpha (Hessian at theta_t) v_t,  v_t = lambda_{t+1} + mu v_{t+1}
//
// with g_t the gradient of 1/(N A) sum_i |pi(s_i) - a_i|^2 and momentum mu. Without momentum u is nothing to remember
// and v is lambda: no step reads or writes either.
//
// The Hessian product comes from one tangent pass along v (R-operator): R x is the derivative of x along v. Products of
// a sum, as R h W + h V, are one product with twice the inner length, so that no tile is loaded and stored twice.
//
// One step is two stages with a barrier after each: rows through all layers and back, then tiles of weight gradients
// with the update in their epilogue, which writes theta_{t+1} (or lambda_t) and its transpose as the next stage reads
// them. A step's tape (theta_t, h, delta: 2.1 MB in the reference shape) is written where it is computed; nothing is
// copied.
#include "sdw/unrolled_bc.h"

#include <cmath>
#include <cstdio>
#include <mutex>
#include <string>

#include "mlp.h"
#include "sdw/memory.h"

namespace sdw::SDW_ISA {
namespace {

// How the window is cut: the tape holds the steps of one segment at a time, and parameters at the start of each.
struct Plan {
    bool keep;         // a backward pass may follow
    int64_t window;    // steps that it goes back through
    int64_t length;    // steps of a segment, the last may be shorter
    int64_t segments;  // one: all steps are on the tape and nothing is run again

    explicit Plan(const UnrolledBCParams& params, bool recompute)
        : keep(params.keep_tape), window(keep ? params.window : 1), length(window) {
        if (recompute) length = static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(window))));
        segments = (window + length - 1) / length;
    }
    int64_t steps(int64_t segment) const { return std::min(length, window - segment * length); }
};

struct Step {
    Weights theta;
    Pass pass;
};

// What a segment is run again from.
struct Start {
    Weights theta, velocity;
};

// Where everything lies in the tape's block.
struct Layout {
    Matrix observations, actions;
    std::vector<Matrix> transposed;  // of the parameters in use
    Weights velocity;                // u
    std::vector<Step> steps;         // of a segment, and one more that has parameters only
    std::vector<Start> starts;       // of each segment, if there are several
    Weights adjoint;                 // lambda; unused without momentum
    Weights direction;               // v
    std::vector<Matrix> direction_transposed;
    Pass tangent;  // R h, R delta
    Matrix observations_gradient, actions_gradient;
    size_t bytes;

    Layout(const Mlp& mlp, const Plan& plan, float* block) {
        Arena arena(block);
        observations = mlp.take_rows(arena, mlp.widths.front());
        actions = mlp.take_rows(arena, mlp.widths.back());
        transposed = mlp.take_transposed(arena);
        velocity = mlp.take_weights(arena);
        for (int64_t step = 0; step < plan.length; ++step) {
            Weights theta = mlp.take_weights(arena);
            steps.push_back({std::move(theta), mlp.take_pass(arena, observations)});
        }
        steps.push_back({mlp.take_weights(arena), {}});
        if (plan.segments > 1) {
            for (int64_t segment = 0; segment < plan.segments; ++segment) {
                Weights theta = mlp.take_weights(arena);
                starts.push_back({std::move(theta), mlp.take_weights(arena)});
            }
        }
        if (plan.keep) {
            adjoint = mlp.take_weights(arena);
            direction = mlp.take_weights(arena);
            direction_transposed = mlp.take_transposed(arena);
            tangent = mlp.take_pass(arena, {});
            observations_gradient = mlp.take_rows(arena, mlp.widths.front());
            actions_gradient = mlp.take_rows(arena, mlp.widths.back());
        }
        bytes = arena.bytes();
    }
};

std::string gibibytes(size_t bytes) {
    char text[32];
    std::snprintf(text, sizeof text, "%.2f GiB", static_cast<double>(bytes) / (1 << 30));
    return text;
}

// The bytes of the tape; throws if the machine does not have them.
size_t checked_bytes(const UnrolledBCParams& params, const Mlp& mlp, const Plan& plan) {
    const size_t bytes = Layout(mlp, plan, nullptr).bytes;
    const size_t available = available_memory();
    if (bytes <= available) return bytes;
    std::string message = "unrolled_bc: the tape of " + std::to_string(plan.window) + " steps with " +
                          std::to_string(params.rows) + " rows needs " + gibibytes(bytes) + " and " +
                          gibibytes(available) + " are available; ";
    if (plan.keep && !params.recompute)
        message += "tape=\"recompute\" needs " + gibibytes(Layout(mlp, Plan(params, true), nullptr).bytes) + ", and ";
    throw OutOfMemory(message + "a smaller window or fewer rows need less");
}

class Unroll final : public UnrolledBCTape {
  public:
    explicit Unroll(const UnrolledBCParams& params)
        : mlp_(params.widths, params.rows),
          plan_(params, params.recompute),
          lr_(params.lr),
          momentum_(params.momentum),
          scale_(2.0f / static_cast<float>(params.rows * params.widths.back())),
          buffer_(checked_bytes(params, mlp_, plan_)),
          at_(mlp_, plan_, buffer_.data()) {}

    void train(const UnrolledBCParams& params);
    void backward(UnrolledBCGradients& gradients, int threads) override;

  private:
    using Strips = std::vector<Strip>;

    // One member's part of the team's work; each returns behind a barrier.
    void copy_weights(const Weights& from, const Weights& to, int member, Team& team) const;
    void transpose_weights(const Weights& theta, const Strips& strips, Team& team) const;
    void descend(const Step& step, const Weights& next, const Strips& strips, GateLists& lists, int member,
                 Team& team) const;
    void run_segment(int64_t segment, const Strips& strips, GateLists& lists, int member, Team& team) const;
    void adjoint_rows(const Step& step, bool want_observations, GateLists& lists, int member, Team& team);
    void adjoint_weights(const Step& step, const Weights* previous, bool first, const Strips& strips, GateLists& lists,
                         Team& team) const;

    Vec descended(Vec gradient, const float* theta, float* velocity) const;
    Vec turned(Vec curvature, float momentum, float* adjoint, const float* direction) const;
    void output_delta(const Pass& pass, Range range) const;
    void output_tangent(const Pass& pass, Range range);

    const Mlp mlp_;
    const Plan plan_;
    const float lr_;
    const float momentum_;
    const float scale_;  // 2 / (N A)
    const Buffer buffer_;
    const Layout at_;
    std::vector<double> lr_gradient_;  // of each row
    int64_t held_ = 0;                 // the segment whose steps are on the tape now
    std::mutex mutex_;                 // the backward pass works inside the tape's block
};

void Unroll::copy_weights(const Weights& from, const Weights& to, int member, Team& team) const {
    for (int l = 0; l < mlp_.layers; ++l) {
        const int64_t floats = panels(mlp_.widths[l + 1]) * from.matrices[l].stride;
        const Range range = team.share(floats / kPanel, member, kPanel);
        std::copy(from.matrices[l].data + range.begin, from.matrices[l].data + range.end,
                  to.matrices[l].data + range.begin);
        if (member == 0) std::copy_n(from.biases[l], panels(mlp_.widths[l + 1]) * kPanel, to.biases[l]);
    }
    team.wait();
}

void Unroll::transpose_weights(const Weights& theta, const Strips& strips, Team& team) const {
    for (const Strip& strip : strips) {
        for (int64_t panel = strip.columns.begin / kPanel; panel < panels(strip.columns.end); ++panel) {
            for (int64_t row = strip.rows.begin; row < strip.rows.end; row += kColTile)
                transpose_tile(theta.matrices[strip.layer], at_.transposed[strip.layer], row, panel);
        }
    }
    team.wait();
}

// From the pre-activations in h[L]: a = tanh(z), delta[L] = c (a - y)(1 - a²).
void Unroll::output_delta(const Pass& pass, Range range) const {
    float* output = pass.h[mlp_.layers].data;
    float* delta = pass.delta[mlp_.layers].data;
    mlp_.for_each_output(range, [&](int64_t offset, int64_t) {
        const Vec a = tanh(load(output + offset));
        store(output + offset, a);
        store(delta + offset, scale_ * (a - load(at_.actions.data + offset)) * (1.0f - a * a));
    });
}

// theta_{t+1} = theta_t - (mu u_t + alpha g), and u.
Vec Unroll::descended(Vec gradient, const float* theta, float* velocity) const {
    if (momentum_ == 0.0f) return load(theta) - lr_ * gradient;
    const Vec moved = momentum_ * load(velocity) + lr_ * gradient;
    store(velocity, moved);
    return load(theta) - moved;
}

// One SGD step: the pass at step.theta, and `next` = theta_{t+1} with its transpose. `next` may be step.theta.
void Unroll::descend(const Step& step, const Weights& next, const Strips& strips, GateLists& lists, int member,
                     Team& team) const {
    const Range range = team.share(mlp_.tiles, member, kRowTile);
    mlp_.forward(lists, step.theta, step.pass, range);
    output_delta(step.pass, range);
    mlp_.backward(lists, at_.transposed, step.pass, range);
    team.wait();
    for (const Strip& strip : strips) {
        const int l = strip.layer;
        const Matrix &from = step.theta.matrices[l], &to = next.matrices[l], &delta = step.pass.delta[l + 1];
        float* velocity = at_.velocity.matrices[l].data;
        const Term terms[] = {{step.pass.h[l], delta, mlp_.rows}};
        mlp_.multiply_columns(
            lists, step.pass, strip, terms, to.stride,
            [&](Vec x, int64_t offset, int64_t) {
                store(to.data + offset, descended(x, from.data + offset, velocity + offset));
            },
            [&](int64_t row, int64_t panel) { transpose_tile(to, at_.transposed[l], row, panel); });
        if (strip.rows.begin == 0) {
            mlp_.for_each_bias(delta, strip, [&](Vec x, int64_t column) {
                store(next.biases[l] + column,
                      descended(x, step.theta.biases[l] + column, at_.velocity.biases[l] + column));
            });
        }
    }
    team.wait();
}

void Unroll::run_segment(int64_t segment, const Strips& strips, GateLists& lists, int member, Team& team) const {
    for (int64_t i = 0; i < plan_.steps(segment); ++i)
        descend(at_.steps[i], at_.steps[i + 1].theta, strips, lists, member, team);
}

void Unroll::train(const UnrolledBCParams& params) {
    std::fill_n(buffer_.data(), at_.steps[0].pass.h[1].data - buffer_.data(), 0.0f);  // padding, and the velocity
    pack(params.observations, mlp_.widths.front(), {0, mlp_.rows}, at_.observations);
    pack(params.actions, mlp_.widths.back(), {0, mlp_.rows}, at_.actions);
    pack_weights(mlp_, params.params, at_.steps[0].theta, at_.transposed);

    const int threads = mlp_.useful_threads(params.threads);
    std::vector<GateLists> gate_lists = mlp_.gate_lists(threads);
    Team::run(threads, [&](int member, Team& team) {
        const FlushDenormals flush;
        GateLists& lists = gate_lists[member];
        const Strips strips = mlp_.strips(team.size())[member];
        const Step& first = at_.steps[0];
        // Steps that leave no tape overwrite their own parameters.
        for (int64_t step = 0; step < params.steps - plan_.window; ++step)
            descend(first, first.theta, strips, lists, member, team);
        for (int64_t segment = 0; segment < plan_.segments; ++segment) {
            if (segment > 0) copy_weights(at_.steps[plan_.length].theta, first.theta, member, team);
            if (plan_.segments > 1) {
                copy_weights(first.theta, at_.starts[segment].theta, member, team);
                copy_weights(at_.velocity, at_.starts[segment].velocity, member, team);
            }
            run_segment(segment, strips, lists, member, team);
        }
    });
    held_ = plan_.segments - 1;
    unpack_weights(mlp_, at_.steps[plan_.steps(held_)].theta, at_.transposed, params.trained);
}

// With R z of the output in tangent.h[L]: R a = (1 - a²) R z, R delta = c ((1 - a²) - 2 (a - y) a) R a, and the
// gradients for the actions, += alpha c R a, and for alpha, -= c <a - y, R a>.
void Unroll::output_tangent(const Pass& pass, Range range) {
    const float* output = pass.h[mlp_.layers].data;
    mlp_.for_each_output(range, [&](int64_t offset, int64_t row) {
        const Vec a = load(output + offset);
        const Vec slope = 1.0f - a * a;
        const Vec residual = a - load(at_.actions.data + offset);
        const Vec tangent = slope * load(at_.tangent.h[mlp_.layers].data + offset);
        store(at_.tangent.delta[mlp_.layers].data + offset, scale_ * (slope - 2.0f * residual * a) * tangent);
        float* gradient = at_.actions_gradient.data + offset;
        store(gradient, load(gradient) + lr_ * scale_ * tangent);
        const Vec products = scale_ * residual * tangent;
        for (int lane = 0; lane < kLanes; ++lane) lr_gradient_[row] -= products[lane];
    });
}

// R h there, R delta back, and the gradients for the observations and actions, for a member's rows.
void Unroll::adjoint_rows(const Step& step, bool want_observations, GateLists& lists, int member, Team& team) {
    const Range range = team.share(mlp_.tiles, member, kRowTile);
    const Pass &pass = step.pass, &tangent = at_.tangent;
    for (int l = 0; l < mlp_.layers; ++l) {
        const float* bias = at_.direction.biases[l];
        const float* h = pass.h[l + 1].data;
        float* out = tangent.h[l + 1].data;
        const bool hidden = l + 1 < mlp_.layers;
        const auto epilogue = [=](Vec x, int64_t offset, int64_t column) {
            x += load(bias + column);
            store(out + offset, hidden ? masked(x, load(h + offset)) : x);
        };
        const Term moved_weights{pass.h[l], at_.direction.matrices[l], mlp_.widths[l]};
        if (l == 0) {  // the observations do not move
            product({moved_weights}, range, mlp_.widths[l + 1], mlp_.stride, epilogue);
        } else {
            const Term moved_inputs{tangent.h[l], step.theta.matrices[l], mlp_.widths[l]};
            mlp_.multiply_rows(lists, pass, l, {moved_inputs, moved_weights}, range, mlp_.widths[l + 1], epilogue);
        }
    }
    output_tangent(pass, range);
    for (int l = mlp_.layers - 1; l >= (want_observations ? 0 : 1); --l) {
        const Term terms[] = {{tangent.delta[l + 1], at_.transposed[l], mlp_.widths[l + 1]},
                              {pass.delta[l + 1], at_.direction_transposed[l], mlp_.widths[l + 1]}};
        const float* h = pass.h[l].data;
        if (l > 0) {
            float* out = tangent.delta[l].data;
            mlp_.multiply_rows(lists, pass, l + 1, terms, range, mlp_.widths[l], [=](Vec x, int64_t offset, int64_t) {
                store(out + offset, masked(x, load(h + offset)));
            });
        } else {
            float* out = at_.observations_gradient.data;
            mlp_.multiply_rows(lists, pass, l + 1, terms, range, mlp_.widths[l], [=](Vec x, int64_t offset, int64_t) {
                store(out + offset, load(out + offset) - lr_ * x);
            });
        }
    }
    team.wait();
}

// v_{t-1} = lambda_t + mu v_t, and lambda_t = lambda_{t+1} - alpha H v_t.
Vec Unroll::turned(Vec curvature, float momentum, float* adjoint, const float* direction) const {
    if (momentum_ == 0.0f) return load(direction) - lr_ * curvature;
    const Vec lambda = load(adjoint) - lr_ * curvature;
    store(adjoint, lambda);
    return lambda + momentum * load(direction);
}

// The direction of the step before, and the transpose of the parameters that it needs. Without a step before, the
// direction is left at lambda.
void Unroll::adjoint_weights(const Step& step, const Weights* previous, bool first, const Strips& strips,
                             GateLists& lists, Team& team) const {
    const float momentum = first ? 0.0f : momentum_;
    for (const Strip& strip : strips) {
        const int l = strip.layer;
        const Matrix& direction = at_.direction.matrices[l];
        float* adjoint = at_.adjoint.matrices[l].data;
        const Matrix& tangent_delta = at_.tangent.delta[l + 1];
        const auto update = [&](Vec x, int64_t offset, int64_t) {
            store(direction.data + offset, turned(x, momentum, adjoint + offset, direction.data + offset));
        };
        const auto transpose_both = [&](int64_t row, int64_t panel) {
            transpose_tile(direction, at_.direction_transposed[l], row, panel);
            if (previous != nullptr) transpose_tile(previous->matrices[l], at_.transposed[l], row, panel);
        };
        const Term moved_deltas{step.pass.h[l], tangent_delta, mlp_.rows};
        if (l == 0) {
            mlp_.multiply_columns(lists, step.pass, strip, {moved_deltas}, direction.stride, update, transpose_both);
        } else {
            const Term moved_inputs{at_.tangent.h[l], step.pass.delta[l + 1], mlp_.rows};
            mlp_.multiply_columns(lists, step.pass, strip, {moved_inputs, moved_deltas}, direction.stride, update,
                                  transpose_both);
        }
        if (strip.rows.begin == 0) {
            mlp_.for_each_bias(tangent_delta, strip, [&](Vec x, int64_t column) {
                float* bias = at_.direction.biases[l] + column;
                store(bias, turned(x, momentum, at_.adjoint.biases[l] + column, bias));
            });
        }
    }
    team.wait();
}

void Unroll::backward(UnrolledBCGradients& gradients, int threads) {
    const std::lock_guard<std::mutex> lock(mutex_);
    float* const scratch = at_.adjoint.matrices[0].data;
    std::fill_n(scratch, buffer_.data() + at_.bytes / sizeof(float) - scratch, 0.0f);
    pack_weights(mlp_, gradients.trained, at_.direction, at_.direction_transposed);
    lr_gradient_.assign(mlp_.tiles * kRowTile, 0.0);

    const bool want_observations = gradients.observations != nullptr, want_params = !gradients.params.empty();
    threads = mlp_.useful_threads(threads);
    std::vector<GateLists> gate_lists = mlp_.gate_lists(threads);
    Team::run(threads, [&](int member, Team& team) {
        const FlushDenormals flush;
        GateLists& lists = gate_lists[member];
        const Strips strips = mlp_.strips(team.size())[member];
        if (momentum_ != 0.0f) copy_weights(at_.direction, at_.adjoint, member, team);
        int64_t held = held_;
        for (int64_t segment = plan_.segments - 1; segment >= 0; --segment) {
            if (segment != std::exchange(held, segment)) {
                copy_weights(at_.starts[segment].theta, at_.steps[0].theta, member, team);
                copy_weights(at_.starts[segment].velocity, at_.velocity, member, team);
                transpose_weights(at_.steps[0].theta, strips, team);
                run_segment(segment, strips, lists, member, team);
            }
            const int64_t last = plan_.steps(segment) - 1;
            transpose_weights(at_.steps[last].theta, strips, team);
            for (int64_t i = last; i >= 0; --i) {
                adjoint_rows(at_.steps[i], want_observations, lists, member, team);
                const bool first = segment + i == 0;
                if (!first || want_params)
                    adjoint_weights(at_.steps[i], i > 0 ? &at_.steps[i - 1].theta : nullptr, first, strips, lists,
                                    team);
            }
        }
    });
    held_ = 0;

    if (want_params) unpack_weights(mlp_, at_.direction, at_.direction_transposed, gradients.params);
    if (want_observations)
        unpack(at_.observations_gradient, mlp_.widths.front(), {0, mlp_.rows}, gradients.observations);
    if (gradients.actions != nullptr)
        unpack(at_.actions_gradient, mlp_.widths.back(), {0, mlp_.rows}, gradients.actions);
    gradients.lr = 0.0;
    for (int64_t row = 0; row < mlp_.rows; ++row) gradients.lr += lr_gradient_[row];
}

}  // namespace

std::unique_ptr<UnrolledBCTape> unrolled_bc(const UnrolledBCParams& params) {
    auto unroll = std::make_unique<Unroll>(params);
    unroll->train(params);
    if (!params.keep_tape) return nullptr;
    return unroll;
}

}  // namespace sdw::SDW_ISA
