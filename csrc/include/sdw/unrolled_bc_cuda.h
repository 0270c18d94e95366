// unrolled_bc (unrolled_bc.h) on a CUDA device: R independent problems of one shape side by side, asynchronously on a
// stream. Owns no memory: the caller brings the workspace, which holds the tape from the forward to the backward pass.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sdw {

struct UnrolledBCCudaProblem {
    int64_t problems;             // R, at least 1
    int64_t rows;                 // N, at least 1
    std::vector<int64_t> widths;  // [D, hidden widths, A]: 2 to 33, each at least 1
    int64_t steps;                // T, at least 1
    int64_t window;               // K in [1, T]: steps at the end that the adjoint goes back through
    float momentum;               // mu of the velocity, 0 at the start and for plain SGD
    bool keep_tape;               // false: no backward pass will follow
    bool recompute;               // keep the parameters of every ~sqrt(K)-th step and run each stretch again
    bool ieee;                    // products in float32; else tf32 with float32 sums and master weights
};

// All pointers are to device memory. `flat` parameters of a problem are W1, b1, W2, b2, ... one behind the other, W_l
// (widths[l], widths[l-1]) row by row: P floats.
struct UnrolledBCCudaParams {
    UnrolledBCCudaProblem problem;
    const float* observations;  // (R, N, D)
    const float* actions;       // (R, N, A)
    const float* params;        // (R, P) at the start
    const float* lr;            // (R) learning rates
    float* trained;             // out: (R, P) after `steps` steps
    void* workspace;            // unrolled_bc_cuda_workspace() bytes, aligned to 128
    void* stream;               // a cudaStream_t
};

struct UnrolledBCCudaGradients {
    UnrolledBCCudaProblem problem;
    bool again;            // not the first backward pass after the forward pass
    const float* trained;  // (R, P) gradients for `trained`
    const float* lr;       // (R), as in the forward pass
    float* observations;   // out: (R, N, D), or null: not wanted
    float* actions;        // out: (R, N, A), or null
    float* params;         // out: (R, P), gradients for the parameters at the start of the window, or null
    float* lr_gradient;    // out: (R)
    void* workspace;       // as the forward pass left it
    void* stream;
};

// Throws std::invalid_argument for a shape that the kernels do not take.
size_t unrolled_bc_cuda_workspace(const UnrolledBCCudaProblem& problem);

void unrolled_bc_cuda(const UnrolledBCCudaParams& params);
void unrolled_bc_cuda_backward(const UnrolledBCCudaGradients& gradients);

}  // namespace sdw
