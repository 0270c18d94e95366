// How far float distances of coordinates may stray: what the kernels of both devices prune by.
#pragma once

#include <cmath>
#include <cstdint>

namespace sdw {

// T(τ) = widen·τ + slack·‖q‖² + floor bounds the float squared distance of every point whose true distance is not above
// that of a point at float squared distance τ, strictly.
//
// With u = 2^-24 the coordinates of a point x are off by at most u‖x‖ <= u(‖q‖ + d) in length, so the distance of two
// by at most A + 2ud with A = 2u‖q‖; summing D squared differences in float adds a factor 1 ± (D + 3)u, once for the
// k-th neighbor and once for the candidate, and a box's distance a third. The rounding is absolute as well as relative,
// so (√τ + 2A)² is needed; (√τ + 2A)² <= (1 + γ)τ + (1 + 1/γ)(2A)² avoids the root. The product form of the distance,
// ‖x‖² + ‖q‖² − 2qx, is off by at most cancel = 1.5(D + 16)u of (‖q‖ + ‖x‖)² instead. `floor` covers what underflows.
struct KnnBounds {
    float widen, slack, floor;

    static KnnBounds differences(int64_t dims) {
        const double u = std::ldexp(1, -24), gamma = 64 * u, r = static_cast<double>(dims + 8) * u;
        return {static_cast<float>((1 + gamma) * (1 + 8 * r)), static_cast<float>((1 + 1 / gamma) * 16 * u * u * 1.5),
                static_cast<float>(dims) * std::ldexp(1.0f, -100)};
    }
    static KnnBounds product(int64_t dims) {
        const double cancel = 1.5 * static_cast<double>(dims + 16) * std::ldexp(1, -24);
        return {static_cast<float>(1 + 16 * cancel), static_cast<float>(16 * cancel),
                static_cast<float>(dims) * std::ldexp(1.0f, -100)};
    }
};

}  // namespace sdw
