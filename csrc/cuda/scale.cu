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

void scale_cuda(const ScaleParams& p) {
    const int64_t blocks = std::min((p.columns + kThreads - 1) / kThreads, kBlocks);
    for (int64_t r = 0; r < p.rows; ++r)
        launch(scale, static_cast<unsigned>(blocks), kThreads, 0, p.stream, p.values + r * p.columns, p.columns,
               p.factors + r);
}

}  // namespace sdw
