// The weighted behavior-cloning loss and its gradient for the predictions, in one pass over memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sdw {

struct WeightedBCLossParams {
    int64_t rows;          // M, at least 1
    int64_t columns;       // A, at least 1
    const float* pred;     // (M, A)
    const float* target;   // (M, A)
    const float* weights;  // (M,); a row of weight zero counts for nothing
    float* gradient;       // out: (M, A), the gradient for pred, or null: loss alone
    int threads;           // at most; the result's bits do not depend on it
};

// Returns sum_i w_i |pred_i - target_i|^2 / (M A).
float weighted_bc_loss(const WeightedBCLossParams& params);

// The same on a CUDA device: all pointers are the device's, nothing is waited for.
struct WeightedBCLossCudaParams {
    int64_t rows;          // M, at least 1
    int64_t columns;       // A, at least 1, below 2^31
    const float* pred;     // (M, A)
    const float* target;   // (M, A)
    const float* weights;  // (M,); a row of weight zero counts for nothing
    float* gradient;       // out: (M, A), the gradient for pred, or null: loss alone
    float* loss;           // out: one number
    void* workspace;       // weighted_bc_loss_cuda_workspace() bytes, aligned to 256
    void* stream;          // a cudaStream_t
};

size_t weighted_bc_loss_cuda_workspace(int64_t rows, int64_t columns);
void weighted_bc_loss_cuda(const WeightedBCLossCudaParams& params);

}  // namespace sdw
