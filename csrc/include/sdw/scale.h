// A gradient times the gradient of the loss that it belongs to, on a CUDA device.
#pragma once

#include <cstdint>

namespace sdw {

// values[i] *= *factor, enqueued on `stream` (a cudaStream_t). A factor of 1, what a plain .backward() passes, costs a
// launch and no traffic; the host need not know it.
void scale_cuda(float* values, int64_t count, const float* factor, void* stream);

}  // namespace sdw
