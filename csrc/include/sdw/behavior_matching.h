// The outer loss of behavior distillation and its gradient for the policy's parameters, in one pass over the states,
// for R independent problems of one shape.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "sdw/head.h"

namespace sdw {

// Where a field names no device, it is for both. Pointers are to memory of the device that the op runs on.
struct BehaviorMatchingParams {
    int64_t problems = 1;         // R, at least 1
    int64_t rows = 1;             // M, at least 1
    std::vector<int64_t> widths;  // [D, hidden widths, A], at least two (CUDA: at most 33), each at least 1
    Head head = Head::tanh;       // of the policy, and with it the loss of a row

    const float* params = nullptr;   // (R, P) flat (flat.h)
    const float* states = nullptr;   // (R, M, D)
    const float* targets = nullptr;  // (R, M, A)
    const float* weights = nullptr;  // (R, M); a row of weight zero counts for nothing
    float* losses = nullptr;         // out: (R,)
    float* gradients = nullptr;      // out: (R, P) for the parameters, flat, or null: losses alone

    int threads = 1;            // CPU: at most; the result's bits do not depend on it
    bool ieee = false;          // CUDA: products in float32 throughout; else operands rounded to tf32
    void* workspace = nullptr;  // CUDA: behavior_matching_cuda_workspace() bytes, aligned to 256
    void* stream = nullptr;     // CUDA: a cudaStream_t
};

// losses[r] = sum_i w_i (loss of row i, by the head) / M
void behavior_matching_cpu(const BehaviorMatchingParams& params);

// The same, enqueued on the stream: waits for nothing and allocates nothing.
void behavior_matching_cuda(const BehaviorMatchingParams& params);

// Bytes that behavior_matching_cuda works in, on the current device. They do not grow with the problems, nor with rows
// beyond 4,096.
size_t behavior_matching_cuda_workspace(int64_t rows, const std::vector<int64_t>& widths, bool want_gradients);

}  // namespace sdw
