// Behavior cloning unrolled: what its two passes share. training.cpp runs forward, adjoint.cpp back.
//
//     u_{t+1}  = mu u_t + alpha g_t,  theta_{t+1} = theta_t - u_{t+1}
//     lambda_t = lambda_{t+1} - alpha (Hessian at theta_t) v_t,  v_t = lambda_{t+1} + mu v_{t+1}
//
// with g_t the gradient of the head's mean loss (sdw/head.h) and momentum mu. Without momentum u is nothing to remember
// and v is lambda: no step reads or writes either.
//
// One step is two stages with a barrier after each: rows through all layers and back, then tiles of weight gradients
// with the update in their epilogue, which writes theta_{t+1} (or lambda_t) and its transpose as the next stage reads
// them. A step's tape (theta_t, h, delta: 2.1 MB in the reference shape) is written where it is computed; nothing is
// copied.
#pragma once

#include <cmath>

#include "../mlp.h"
#include "sdw/unrolled_bc.h"

namespace sdw::SDW_ISA::unrolled {

// How the window is cut: the tape holds the steps of one segment at a time, and parameters at the start of each.
struct Plan {
    bool keep;         // a backward pass may follow
    int64_t window;    // steps that it goes back through
    int64_t length;    // steps of a segment, the last may be shorter
    int64_t segments;  // one: all steps are on the tape and nothing is run again

    explicit Plan(const UnrolledBCParams& params, bool recompute)
        : keep(params.keep_tape), window(keep ? params.window : 1), length(window) {
        if (recompute) length = static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(window))));
        segments = (window - 1) / length + 1;
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

// One problem of the R.
class Unroll {
  public:
    // block: of the layout's size, and the problem's own.
    Unroll(const UnrolledBCParams& params, int64_t problem, float* block)
        : mlp_(params.widths, params.rows),
          plan_(params, params.recompute),
          problem_(problem),
          lr_(params.lr[problem]),
          momentum_(params.momentum),
          head_(params.head),
          scale_(loss_slope(head_) / static_cast<float>(params.rows * loss_divisor(head_, params.widths.back()))),
          block_(block),
          at_(mlp_, plan_, block) {}

    // From and into this problem's part of the tensors, with so many threads at most.
    void train(const UnrolledBCParams& params, int threads);
    void backward(const UnrolledBCGradients& gradients, int threads);

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
    const int64_t problem_;  // its number
    const float lr_;
    const float momentum_;
    const Head head_;
    const float scale_;  // c of head.h
    float* const block_;
    const Layout at_;
    std::vector<double> lr_gradient_;  // of each row
    int64_t held_ = 0;                 // the segment whose steps are on the tape now
};

}  // namespace sdw::SDW_ISA::unrolled
