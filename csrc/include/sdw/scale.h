// Gradients times the gradients of the losses that they belong to, on a CUDA device.
#pragma once

#include <cstdint>

namespace sdw {

struct ScaleParams {
    int64_t rows = 1;                // R, at least 1
    int64_t columns = 1;             // numbers of a row, at least 1
    float* values = nullptr;         // (R, columns), scaled in place
    const float* factors = nullptr;  // (R,), one a row
    void* stream = nullptr;          // a cudaStream_t
};

// values[r, i] *= factors[r]. A factor of 1, what a plain .backward() passes, costs a launch and no traffic; the host
// need not know it.
void scale_cuda(const ScaleParams& params);

}  // namespace sdw
