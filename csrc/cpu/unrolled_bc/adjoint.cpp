// Behavior cloning unrolled: the backward pass along the tape.
//
// The Hessian product comes from one tangent pass along v (R-operator): R x is the derivative of x along v. Products of
// a sum, as R h W + h V, are one product with twice the inner length, so that no tile is loaded and stored twice.
#include "sdw/flat.h"
#include "unroll.h"

namespace sdw::SDW_ISA::unrolled {

// With R z of the output in tangent.h[L]: R delta, and the gradients for the actions, += alpha c moved, and for alpha,
// -= c <error, moved> (head.h).
void Unroll::output_tangent(const Pass& pass, Range range) {
    const float *output = pass.h[mlp_.layers].data, *tangent = at_.tangent.h[mlp_.layers].data;
    const float* actions = at_.actions.data;
    float *delta = at_.tangent.delta[mlp_.layers].data, *gradient = at_.actions_gradient.data;
    with_head(head_, [&](auto kind) {
        mlp_.for_each_output(range, [&](const OutputRow& row) {
            const auto head = kind.of_tangents(row, output, actions, tangent);
            row.for_each([&](int64_t offset, int64_t) {
                const Vec a = load(output + offset);
                const Vec error = head.error(a, load(actions + offset));
                const Vec moved = head.moved(a, load(tangent + offset));
                store(delta + offset, scale_ * head.curvature(a, error) * moved);
                store(gradient + offset, load(gradient + offset) + lr_ * scale_ * moved);
                const Vec products = scale_ * error * moved;
                for (int lane = 0; lane < kLanes; ++lane) lr_gradient_[row.row] -= products[lane];
            });
        });
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

void Unroll::backward(const UnrolledBCGradients& gradients, int most_threads) {
    float* const scratch = at_.adjoint.matrices[0].data;
    std::fill_n(scratch, block_ + at_.bytes / sizeof(float) - scratch, 0.0f);
    const int64_t inputs = mlp_.widths.front(), outputs = mlp_.widths.back(), flat = flat_size(mlp_.widths);
    pack_weights(mlp_, gradients.trained + problem_ * flat, at_.direction, at_.direction_transposed);
    lr_gradient_.assign(mlp_.tiles * kRowTile, 0.0);

    const bool want_observations = gradients.observations != nullptr, want_params = gradients.params != nullptr;
    const int threads = mlp_.useful_threads(most_threads);
    std::vector<GateLists> gate_lists = mlp_.gate_lists(threads);
    const int64_t on_tape = std::exchange(held_, plan_.segments == 1 ? 0 : -1);  // unknown until this has gone through
    Team::run(threads, [&](int member, Team& team) {
        const FlushDenormals flush;
        GateLists& lists = gate_lists[member];
        const Strips strips = mlp_.strips(team.size())[member];
        if (momentum_ != 0.0f) copy_weights(at_.direction, at_.adjoint, member, team);
        int64_t held = on_tape;
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

    if (want_params) unpack_weights(mlp_, at_.direction, at_.direction_transposed, gradients.params + problem_ * flat);
    if (want_observations)
        unpack(at_.observations_gradient, inputs, {0, mlp_.rows},
               gradients.observations + problem_ * mlp_.rows * inputs);
    if (gradients.actions != nullptr)
        unpack(at_.actions_gradient, outputs, {0, mlp_.rows}, gradients.actions + problem_ * mlp_.rows * outputs);
    double lr = 0.0;
    for (int64_t row = 0; row < mlp_.rows; ++row) lr += lr_gradient_[row];
    gradients.lr[problem_] = static_cast<float>(lr);
}

}  // namespace sdw::SDW_ISA::unrolled
