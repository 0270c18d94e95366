// Sums in an order that does not depend on when threads run.
#pragma once

#include "launch.h"

namespace sdw {

// The sum over the block's threads, a power of two of them, known to thread 0; `scratch` holds a double a thread. No
// one may still be using it, and a barrier must follow before it is used again.
__device__ inline double block_sum(double value, double* scratch) {
    scratch[threadIdx.x] = value;
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
    }
    return threadIdx.x == 0 ? scratch[0] : 0.0;
}

// The sum of `count` doubles in global memory, by one block.
__device__ inline double block_sum_of(const double* values, int64_t count, double* scratch) {
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += values[i];
    return block_sum(sum, scratch);
}

}  // namespace sdw
