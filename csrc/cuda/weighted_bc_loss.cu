// The weighted loss and its gradient in one pass at memory speed: 8 bytes read and 4 written an element, and 4 read a
// row. A block takes one chunk of the elements, whatever the device, and leaves its sum in the workspace; a second
// launch adds the sums up in their order. So the bits depend on the input alone.
#include "reduce.h"
#include "sdw/weighted_bc_loss.h"

namespace sdw {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // vectors of four elements that a thread has under way from each array
constexpr int kChunk = 2 * kThreads * kInFlight * 4;

struct Params {
    const float *pred, *target, *weights;
    float* gradient;  // or null
    double* sums;     // one a chunk
    int64_t elements;
    uint32_t columns;
    float scale;
};

// Walks a chunk's elements from `offset` on and knows the row of each.
class Rows {
  public:
    SDW_HOST_DEVICE Rows(int64_t row, uint32_t phase, uint32_t offset, uint32_t columns)
        : row_(row + (phase + offset) / columns), column_((phase + offset) % columns), columns_(columns) {}
    SDW_HOST_DEVICE int64_t next() {
        const int64_t row = row_;
        if (++column_ == columns_) {
            column_ = 0;
            ++row_;
        }
        return row;
    }

  private:
    int64_t row_;
    uint32_t column_, columns_;
};

// w e² of one element; its gradient is 2 scale w e. A weight of zero makes the error zero, whatever the target.
__device__ inline float loss_of(const Params& p, float pred, float target, int64_t row, float& gradient) {
    const float weight = __ldg(p.weights + row);
    const float error = weight == 0.0f ? 0.0f : pred - target;
    const float weighted = weight * error;
    gradient = 2.0f * p.scale * weighted;
    return weighted * error;
}

// Where a chunk lies: it begins `phase` columns into row `row`.
struct Chunk {
    const float *pred, *target;
    float* gradient;
    int64_t row;
    uint32_t phase, count;

    __device__ Chunk(const Params& p, int64_t first)
        : pred(p.pred + first),
          target(p.target + first),
          gradient(p.gradient == nullptr ? nullptr : p.gradient + first),
          row(first / p.columns),
          phase(static_cast<uint32_t>(first % p.columns)),
          count(static_cast<uint32_t>(min(p.elements - first, static_cast<int64_t>(kChunk)))) {}
};

__device__ inline float4 load4(const float* at) { return __ldg(reinterpret_cast<const float4*>(at)); }

// Four whole elements from `offset` on, already loaded.
__device__ inline float loss_of_four(const Params& p, const Chunk& c, uint32_t offset, float4 pred, float4 target) {
    Rows rows(c.row, c.phase, offset, p.columns);
    float4 gradient;
    float loss = loss_of(p, pred.x, target.x, rows.next(), gradient.x);
    loss += loss_of(p, pred.y, target.y, rows.next(), gradient.y);
    loss += loss_of(p, pred.z, target.z, rows.next(), gradient.z);
    loss += loss_of(p, pred.w, target.w, rows.next(), gradient.w);
    if (c.gradient != nullptr) *reinterpret_cast<float4*>(c.gradient + offset) = gradient;
    return loss;
}

// Up to four elements, one by one: the array's end, or arrays that do not begin at multiples of 16 bytes.
__device__ inline float loss_of_some(const Params& p, const Chunk& c, uint32_t offset) {
    Rows rows(c.row, c.phase, offset, p.columns);
    float loss = 0.0f, gradient;
    for (uint32_t e = offset; e < min(offset + 4, c.count); ++e) {
        loss += loss_of(p, __ldg(c.pred + e), __ldg(c.target + e), rows.next(), gradient);
        if (c.gradient != nullptr) c.gradient[e] = gradient;
    }
    return loss;
}

template <bool aligned>
__global__ void __launch_bounds__(kThreads) sum_chunk(const __grid_constant__ Params p) {
    const Chunk c(p, static_cast<int64_t>(blockIdx.x) * kChunk);
    double sum = 0.0;
    for (uint32_t begin = 4 * threadIdx.x; begin < c.count; begin += 4 * kThreads * kInFlight) {
        float4 pred[kInFlight], target[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const uint32_t offset = begin + 4 * kThreads * i;
            if (!aligned || offset + 4 > c.count) continue;
            pred[i] = load4(c.pred + offset);
            target[i] = load4(c.target + offset);
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const uint32_t offset = begin + 4 * kThreads * i;
            sum += aligned && offset + 4 <= c.count ? loss_of_four(p, c, offset, pred[i], target[i])
                                                    : loss_of_some(p, c, offset);
        }
    }
    sum = block_sum(sum, reinterpret_cast<double*>(shared_memory()));
    if (threadIdx.x == 0) p.sums[blockIdx.x] = sum;
}

struct TotalParams {
    const double* sums;
    int64_t count;
    float scale;
    float* loss;
};

__global__ void __launch_bounds__(1024) total(TotalParams p) {
    const double sum = block_sum_of(p.sums, p.count, reinterpret_cast<double*>(shared_memory()));
    if (threadIdx.x == 0) *p.loss = static_cast<float>(sum * p.scale);
}

int64_t chunks_of(int64_t elements) { return (elements + kChunk - 1) / kChunk; }

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

size_t weighted_bc_loss_cuda_workspace(int64_t rows, int64_t columns) {
    return static_cast<size_t>(chunks_of(rows * columns)) * sizeof(double);
}

void weighted_bc_loss_cuda(const WeightedBCLossParams& p) {
    const int64_t elements = p.rows * p.columns, chunks = chunks_of(elements);
    const float scale = 1.0f / (static_cast<float>(p.rows) * static_cast<float>(p.columns));
    auto* sums = static_cast<double*>(p.workspace);
    const bool vectors = aligned(p.pred) && aligned(p.target) && aligned(p.gradient);
    launch(vectors ? sum_chunk<true> : sum_chunk<false>, dim3(static_cast<unsigned>(chunks)), kThreads,
           kThreads * sizeof(double), p.stream,
           Params{p.pred, p.target, p.weights, p.gradient, sums, elements, static_cast<uint32_t>(p.columns), scale});
    const unsigned threads = chunks > kThreads ? 1024 : kThreads;
    launch(total, 1, threads, threads * sizeof(double), p.stream, TotalParams{sums, chunks, scale, p.loss});
}

}  // namespace sdw
