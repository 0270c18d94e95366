// Behavior cloning unrolled: T full-batch SGD steps of a ReLU MLP, and the adjoint through them, for R independent
// problems of one shape.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "sdw/head.h"

namespace sdw {

// Where a field names no device, it is for both. Pointers are to memory of the device that the op runs on.
struct UnrolledBCParams {
    int64_t problems = 1;         // R, at least 1
    int64_t rows = 1;             // N, at least 1
    std::vector<int64_t> widths;  // [D, hidden widths, A], at least two (CUDA: at most 33), each at least 1
    int64_t steps = 1;            // T, at least 1
    int64_t window = 1;           // K in [1, T]: steps at the end that the adjoint goes back through
    Head head = Head::tanh;       // of the policy, and with it the loss: the mean over rows
    float momentum = 0.0f;        // mu in [0, 1) of the velocity, which starts at 0; 0 is plain SGD
    bool keep_tape = false;       // a backward pass may follow
    bool recompute = false;       // keep the parameters of every ~sqrt(K)-th step only, and run each stretch again

    const float* observations = nullptr;  // (R, N, D)
    const float* actions = nullptr;       // (R, N, A) targets
    const float* params = nullptr;        // (R, P) at the start, flat (flat.h)
    const float* lr = nullptr;            // (R,) learning rates alpha; CUDA: must outlive the tape
    float* trained = nullptr;             // out: (R, P) after `steps` steps, flat

    int threads = 1;            // CPU: at most; the result's bits do not depend on it
    bool ieee = false;          // CUDA: products in float32; else tf32 with float32 sums and master weights
    void* workspace = nullptr;  // CUDA: unrolled_bc_cuda_workspace() bytes, aligned to 128; must outlive the tape
    void* stream = nullptr;     // CUDA: a cudaStream_t
};

struct UnrolledBCGradients {
    const float* trained = nullptr;  // (R, P) gradients for `trained`, flat
    float* observations = nullptr;   // out: (R, N, D), or null: not wanted
    float* actions = nullptr;        // out: (R, N, A), or null
    float* params = nullptr;         // out: (R, P) for the parameters at the start of the window, flat, or null
    float* lr = nullptr;             // out: (R,)
    int threads = 1;                 // CPU: at most
    void* stream = nullptr;          // CUDA: a cudaStream_t
};

// What the forward pass leaves for the backward pass.
class UnrolledBCTape {
  public:
    virtual ~UnrolledBCTape() = default;
    // May be called again. CPU: and from any thread (calls wait for each other).
    virtual void backward(const UnrolledBCGradients& gradients) = 0;
};

// Trains; returns the tape, or null without keep_tape. The tape owns its memory. Throws OutOfMemory (sdw/memory.h)
// before it allocates anything if that cannot fit.
std::unique_ptr<UnrolledBCTape> unrolled_bc_cpu(const UnrolledBCParams& params);

// Bytes of the tapes that unrolled_bc_cpu would hold; looks at no pointer.
size_t unrolled_bc_cpu_memory(const UnrolledBCParams& params);

// The same, enqueued on the stream: waits for nothing and allocates no device memory. The tape lies in the workspace.
std::unique_ptr<UnrolledBCTape> unrolled_bc_cuda(const UnrolledBCParams& params);

// Bytes that unrolled_bc_cuda works in; looks at no pointer. Throws std::invalid_argument for a shape that the kernels
// do not take.
size_t unrolled_bc_cuda_workspace(const UnrolledBCParams& params);

}  // namespace sdw
