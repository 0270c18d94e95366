// Behavior cloning unrolled: T full-batch SGD steps of a ReLU MLP with tanh output, and the adjoint through them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace sdw {

struct UnrolledBCParams {
    int64_t rows;                 // N, at least 1
    std::vector<int64_t> widths;  // [D, hidden widths, A], at least two, each at least 1
    const float* observations;    // (N, D)
    const float* actions;         // (N, A)
    std::vector<const float*>
        params;                   // [W1, b1, W2, b2, ...] at the start: W_l (widths[l], widths[l-1]), b_l (widths[l])
    std::vector<float*> trained;  // out: the same after `steps` steps
    float lr;                     // alpha, the learning rate
    float momentum;               // mu of the velocity, 0 at the start and for plain SGD
    int64_t steps;                // T, at least 1
    int64_t window;               // K in [1, T]: steps at the end that the adjoint goes back through
    bool keep_tape;               // false: no backward pass will follow
    bool recompute;               // keep the parameters of every ~sqrt(K)-th step and run each stretch again
    int threads;                  // at most; the result's bits do not depend on it
};

struct UnrolledBCGradients {
    std::vector<const float*> trained;  // in: gradients for `trained`, same shapes
    float* observations;                // out: (N, D), or null: not wanted
    float* actions;                     // out: (N, A), or null
    std::vector<float*> params;         // out: gradients for the parameters at the start of the window, or empty
    double lr;                          // out: gradient for alpha
};

// What the forward pass leaves for the backward pass.
class UnrolledBCTape {
  public:
    virtual ~UnrolledBCTape() = default;
    // May be called again, and from any thread (calls wait for each other).
    virtual void backward(UnrolledBCGradients& gradients, int threads) = 0;
};

// Trains; returns the tape, or null without keep_tape. Throws OutOfMemory (sdw/memory.h) before it allocates anything
// if the tape cannot fit.
std::unique_ptr<UnrolledBCTape> unrolled_bc(const UnrolledBCParams& params);

}  // namespace sdw
