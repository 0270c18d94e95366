// The outer loss of behavior distillation and its gradient for the policy's parameters, in one pass over the states.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sdw {

struct BehaviorMatchingParams {
    int64_t rows;                      // M, at least 1
    std::vector<int64_t> widths;       // [D, hidden widths, A], at least two, each at least 1
    std::vector<const float*> params;  // [W1, b1, W2, b2, ...]: W_l (widths[l], widths[l-1]), b_l (widths[l])
    const float* states;               // (M, D)
    const float* targets;              // (M, A)
    const float* weights;              // (M,); a row of weight zero counts for nothing
    std::vector<float*> gradients;     // out: as params, or empty: loss alone
    int threads;                       // at most; the result's bits do not depend on it
};

// Returns sum_i w_i |tanh(MLP(s_i)) - y_i|^2 / (M A).
float behavior_matching(const BehaviorMatchingParams& params);

// The same on a CUDA device: all pointers are the device's, nothing is waited for.
struct BehaviorMatchingCudaParams {
    int64_t rows;                      // M, at least 1
    std::vector<int64_t> widths;       // [D, hidden widths, A], at least two, each at least 1
    std::vector<const float*> params;  // [W1, b1, W2, b2, ...]: W_l (widths[l], widths[l-1]), b_l (widths[l])
    const float* states;               // (M, D)
    const float* targets;              // (M, A)
    const float* weights;              // (M,); a row of weight zero counts for nothing
    float* gradients;                  // out: all gradients in the order of params, one behind the other, or null
    float* loss;                       // out: one number
    bool ieee;                         // products in float32 throughout; false: operands rounded to tf32
    void* workspace;                   // behavior_matching_cuda_workspace() bytes, aligned to 256
    void* stream;                      // a cudaStream_t
};

// Bytes of device memory that the op works in, on the current device. They do not grow with rows beyond 4,096.
size_t behavior_matching_cuda_workspace(int64_t rows, const std::vector<int64_t>& widths, bool want_gradients);
void behavior_matching_cuda(const BehaviorMatchingCudaParams& params);

}  // namespace sdw
