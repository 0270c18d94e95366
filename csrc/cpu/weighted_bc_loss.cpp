// The weighted loss and its gradient in one pass: 8 bytes read and 4 written an element, no temporary.
#include "sdw/weighted_bc_loss.h"

#include <algorithm>
#include <vector>

#include "simd.h"
#include "team.h"

namespace sdw::SDW_ISA {
namespace {

typedef float UnalignedVec __attribute__((vector_size(4 * kLanes), may_alias, aligned(4)));

inline Vec load_unaligned(const float* at) { return *reinterpret_cast<const UnalignedVec*>(at); }
inline void store_unaligned(float* at, Vec x) { *reinterpret_cast<UnalignedVec*>(at) = x; }

constexpr int64_t kChunk = 1 << 16;  // elements whose sum is one term of the loss, whatever the threads
// Elements from which on a gradient is larger than a second-level cache and is better written past it.
constexpr int64_t kStreamFrom = 1 << 20;

// A vector of elements that begins `phase` columns into a row holds parts of several rows. Lane i belongs to the row
// (phase + i) / columns further on: its weight is a permutation of the next kLanes weights, one of `columns` patterns.
struct Phase {
    IntVec rows;         // of each lane, counted from the first lane's
    int64_t next, step;  // phase of the next vector, and rows to its first lane
};

std::vector<Phase> phases(int64_t columns) {
    std::vector<Phase> result(columns);
    for (int64_t phase = 0; phase < columns; ++phase) {
        Phase& p = result[phase];
        for (int lane = 0; lane < kLanes; ++lane) p.rows[lane] = static_cast<int32_t>((phase + lane) / columns);
        p.next = (phase + kLanes) % columns;
        p.step = (phase + kLanes) / columns;
    }
    return result;
}

enum class Gradient { kNone, kStored, kStreamed };

// Σ over elements [begin, end) of w e², and their gradient 2 scale w e. A weight of zero makes the error zero.
template <Gradient kGradient>
double loss_of(const WeightedBCLossParams& p, const std::vector<Phase>& table, float scale, int64_t begin,
               int64_t end) {
    const float twice = 2.0f * scale;
    Vec sum{};
    int64_t i = begin, row = begin / p.columns, phase = begin % p.columns;
    for (; i + kLanes <= end && row + kLanes <= p.rows; i += kLanes) {
        const Phase& now = table[phase];
        const Vec weight = permuted(load_unaligned(p.weights + row), now.rows);
        const Vec difference = load_unaligned(p.pred + i) - load_unaligned(p.target + i);
        const Vec error = weight == 0.0f ? Vec{} : difference;
        const Vec weighted = weight * error;
        sum += weighted * error;
        if (kGradient == Gradient::kStored) store_unaligned(p.gradient + i, twice * weighted);
        if (kGradient == Gradient::kStreamed) stream(p.gradient + i, twice * weighted);
        phase = now.next;
        row += now.step;
    }
    double loss = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) loss += sum[lane];
    for (; i < end; ++i) {
        const float weight = p.weights[i / p.columns];
        const float error = weight == 0.0f ? 0.0f : p.pred[i] - p.target[i];
        const float weighted = weight * error;
        loss += weighted * error;
        if (kGradient != Gradient::kNone) p.gradient[i] = twice * weighted;
    }
    if (kGradient == Gradient::kStreamed) end_streaming();
    return loss;
}

}  // namespace

void weighted_bc_loss_cpu(const WeightedBCLossParams& p) {
    const int64_t elements = p.rows * p.columns;
    const int64_t chunks = (elements + kChunk - 1) / kChunk;
    const float scale = 1.0f / (static_cast<float>(p.rows) * static_cast<float>(p.columns));
    const std::vector<Phase> table = phases(p.columns);
    std::vector<double> losses(chunks);
    const bool aligned = reinterpret_cast<uintptr_t>(p.gradient) % sizeof(Vec) == 0;
    const auto chunk_loss = p.gradient == nullptr                ? loss_of<Gradient::kNone>
                            : aligned && elements >= kStreamFrom ? loss_of<Gradient::kStreamed>
                                                                 : loss_of<Gradient::kStored>;
    // Below half a million elements the whole takes no longer than starting a thread.
    Team::run(static_cast<int>(std::min<int64_t>(p.threads, 1 + chunks / 8)), [&](int member, Team& team) {
        const Range share = team.share(chunks, member);
        for (int64_t chunk = share.begin; chunk < share.end; ++chunk)
            losses[chunk] = chunk_loss(p, table, scale, chunk * kChunk, std::min(elements, (chunk + 1) * kChunk));
    });
    double loss = 0.0;
    for (const double part : losses) loss += part;
    *p.loss = static_cast<float>(loss * scale);
}

}  // namespace sdw::SDW_ISA
