// The weighted behavior-cloning loss and its gradient for the predictions, in one pass over memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sdw {

// Where a field names no device, it is for both. Pointers are to memory of the device that the op runs on.
struct WeightedBCLossParams {
    int64_t rows = 1;     // M, at least 1
    int64_t columns = 1;  // A, at least 1; CUDA: below 2^31

    const float* pred = nullptr;     // (M, A)
    const float* target = nullptr;   // (M, A)
    const float* weights = nullptr;  // (M,); a row of weight zero counts for nothing
    float* loss = nullptr;           // out: one number
    float* gradient = nullptr;       // out: (M, A) for pred, or null: the loss alone

    int threads = 1;            // CPU: at most; the result's bits do not depend on it
    void* workspace = nullptr;  // CUDA: weighted_bc_loss_cuda_workspace() bytes, aligned to 256
    void* stream = nullptr;     // CUDA: a cudaStream_t
};

// loss = sum_i w_i |pred_i - target_i|^2 / (M A)
void weighted_bc_loss_cpu(const WeightedBCLossParams& params);

// The same, enqueued on the stream: waits for nothing and allocates nothing.
void weighted_bc_loss_cuda(const WeightedBCLossParams& params);

// Bytes that weighted_bc_loss_cuda works in.
size_t weighted_bc_loss_cuda_workspace(int64_t rows, int64_t columns);

}  // namespace sdw
