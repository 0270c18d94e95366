// The last layer (sdw/head.h), the only place where one head differs from another; csrc/cpu/head.h has the table.
#pragma once

#include "launch.h"
#include "sdw/head.h"

namespace sdw {

// What the elements of a softmax's row share; the other heads do not look at it.
struct RowSums {
    float mass;          // sum of the targets
    float largest, sum;  // max z, sum of e^(z - max z); for outputs
    float mean;          // <p, R z>; for tangents
};

__device__ inline float head_output(Head head, float z, const RowSums& row) {
    if (head == Head::tanh) return tanhf(z);
    return head == Head::identity ? z : expf(z - row.largest) / row.sum;
}
__device__ inline float head_error(Head head, float a, float y, const RowSums& row) {
    return head == Head::softmax ? row.mass * a - y : a - y;
}
__device__ inline float head_delta(Head head, float scaled_error, float a) {
    return head == Head::tanh ? scaled_error * (1 - a * a) : scaled_error;
}
__device__ inline float head_loss(Head head, float z, float y, float error, const RowSums& row) {
    return head == Head::softmax ? y * (logf(row.sum) - (z - row.largest)) : error * error;
}
__device__ inline float head_moved(Head head, float a, float tangent, const RowSums& row) {
    if (head == Head::tanh) return (1 - a * a) * tangent;
    return head == Head::identity ? tangent : tangent - row.mean;
}
__device__ inline float head_curvature(Head head, float a, float error, const RowSums& row) {
    if (head == Head::tanh) return (1 - a * a) - 2 * error * a;
    return head == Head::identity ? 1.0f : row.mass * a;
}

// Sums and the largest over a warp, known to all its lanes.
__device__ inline float warp_sum(float x) {
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}
__device__ inline float warp_max(float x) {
    for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
    return x;
}

// The sums of a row with `columns` elements z(column) and targets y(column), by one warp.
template <typename Element, typename Target>
__device__ RowSums output_sums(int columns, int lane, Element z, Target y) {
    float mass = 0, largest = -INFINITY, sum = 0;
    for (int column = lane; column < columns; column += 32) {
        mass += y(column);
        largest = fmaxf(largest, z(column));
    }
    largest = warp_max(largest);
    for (int column = lane; column < columns; column += 32) sum += expf(z(column) - largest);
    return {warp_sum(mass), largest, warp_sum(sum), 0};
}

// The same for the tangents R z(column) of outputs a(column).
template <typename Element, typename Target, typename Tangent>
__device__ RowSums tangent_sums(int columns, int lane, Element a, Target y, Tangent tangent) {
    float mass = 0, mean = 0;
    for (int column = lane; column < columns; column += 32) {
        mass += y(column);
        mean += a(column) * tangent(column);
    }
    return {warp_sum(mass), 0, 0, warp_sum(mean)};
}

}  // namespace sdw
