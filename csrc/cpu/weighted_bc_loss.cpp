// The weighted loss and its gradient in one pass: 8 bytes read and 4 written an element, no temporary.
#include "sdw/weighted_bc_loss.h"

#include <algorithm>
#include <vector>

#include "team.h"

namespace sdw::SDW_ISA {
namespace {

typedef float Unaligned __attribute__((vector_size(4 * kLanes), may_alias, aligned(4)));

Vec load_unaligned(const float* at) { return *reinterpret_cast<const Unaligned*>(at); }
void store_unaligned(float* at, Vec x) { *reinterpret_cast<Unaligned*>(at) = x; }

constexpr int64_t kBlock = 1024;     // elements whose weights are spread out at a time
constexpr int64_t kChunk = 1 << 16;  // elements whose sum is one term of the loss, whatever the threads

// Spreads the rows' weights over elements [begin, begin + count) of the matrix. Whole vectors are written: each row's
// excess is overwritten by the next row, the last one's lies in the buffer's padding.
void spread_weights(const float* weights, int64_t columns, int64_t begin, int64_t count, float* out) {
    int64_t row = begin / columns;
    int64_t at = row * columns - begin;  // where the row begins, at or before 0
    for (; at < count; ++row, at += columns) {
        const Vec w = broadcast(weights[row]);
        const int64_t end = std::min(count, at + columns);
        for (int64_t i = std::max<int64_t>(at, 0); i < end; i += kLanes) store_unaligned(out + i, w);
    }
}

// Sum over elements [begin, end) of w e², and their gradient 2 scale w e. A weight of zero makes the error zero.
double loss_of(const WeightedBCLossParams& p, float scale, int64_t begin, int64_t end) {
    alignas(64) float w[kBlock + kLanes];
    double loss = 0.0;
    for (int64_t first = begin; first < end; first += kBlock) {
        const int64_t count = std::min(kBlock, end - first);
        spread_weights(p.weights, p.columns, first, count, w);
        const float *pred = p.pred + first, *target = p.target + first;
        float* gradient = p.gradient == nullptr ? nullptr : p.gradient + first;
        Vec sum{};
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) {
            const Vec weight = load(w + i);
            const Vec difference = load_unaligned(pred + i) - load_unaligned(target + i);
            const Vec error = weight == 0.0f ? Vec{} : difference;
            const Vec weighted = weight * error;
            sum += weighted * error;
            if (gradient != nullptr) store_unaligned(gradient + i, 2.0f * scale * weighted);
        }
        for (int lane = 0; lane < kLanes; ++lane) loss += sum[lane];
        for (; i < count; ++i) {
            const float error = w[i] == 0.0f ? 0.0f : pred[i] - target[i];
            const float weighted = w[i] * error;
            loss += weighted * error;
            if (gradient != nullptr) gradient[i] = 2.0f * scale * weighted;
        }
    }
    return loss;
}

}  // namespace

float weighted_bc_loss(const WeightedBCLossParams& p) {
    const int64_t elements = p.rows * p.columns;
    const int64_t chunks = (elements + kChunk - 1) / kChunk;
    const float scale = 1.0f / (static_cast<float>(p.rows) * static_cast<float>(p.columns));
    std::vector<double> losses(chunks);
    // A thread is worth starting for two chunks, about 50 microseconds of memory traffic.
    Team::run(static_cast<int>(std::min<int64_t>(p.threads, 1 + chunks / 4)), [&](int member, Team& team) {
        const Range share = team.share(chunks, member);
        for (int64_t chunk = share.begin; chunk < share.end; ++chunk)
            losses[chunk] = loss_of(p, scale, chunk * kChunk, std::min(elements, (chunk + 1) * kChunk));
    });
    double loss = 0.0;
    for (const double part : losses) loss += part;
    return static_cast<float>(loss * scale);
}

}  // namespace sdw::SDW_ISA
