#include <algorithm>

#include "launch.h"
#include "sdw/scale.h"

namespace sdw {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlocks = 1024;  // at most: few enough to come and go at once

__global__ void __launch_bounds__(kThreads) scale(float* values, int64_t count, const float* factor) {
    const float f = *factor;
    if (f == 1.0f) return;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) values[i] *= f;
}

}  // namespace

void scale_cuda(float* values, int64_t count, const float* factor, void* stream) {
    const int64_t blocks = std::min((count + kThreads - 1) / kThreads, kBlocks);
    launch(scale, static_cast<unsigned>(blocks), kThreads, 0, stream, values, count, factor);
}

}  // namespace sdw
