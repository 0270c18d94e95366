// One problem of unrolled_bc in a kernel's workspace: its matrices, and where a pass and a step keep theirs.
#pragma once

#include "head.h"
#include "team.h"

namespace sdw::unrolled {

struct Kernel {
    Network net;
    Plan plan;
    Layout at;
    Groups groups;
    int problems;
    float* workspace;
    unsigned* counters;  // one a group, kCounterStride apart, zero at the start
    int strip;           // floats of a strip of rows in shared memory, 0 where it does not fit
    const float* lr;
    float momentum;
    Head head;
    float scale;  // c of head.h
};

// Of an 8 x 8 part of a matrix, of which a lane has row g, columns 2t and 2t + 1: column g, rows 2t and 2t + 1.
__device__ inline float2 transposed(float x0, float x1) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int source = lane % 4 * 8 + lane / 8;  // has row 2t, of which column g is its first or second number
    const bool odd = lane / 4 % 2 != 0;
    const float even0 = __shfl_sync(0xffffffffu, x0, source), even1 = __shfl_sync(0xffffffffu, x1, source);
    const float odd0 = __shfl_sync(0xffffffffu, x0, source + 4), odd1 = __shfl_sync(0xffffffffu, x1, source + 4);
    return odd ? make_float2(even1, odd1) : make_float2(even0, odd0);
}

// A matrix in tiles and its transpose, in tiles of its own.
struct Pair {
    float* rows;        // (height, width)
    float* columns;     // (width, height)
    int height, width;  // padded to 16 and to 32

    __device__ Pair(float* data, int allocated, int height_, int width_)
        : rows(data), columns(data + static_cast<int64_t>(allocated) * width_), height(height_), width(width_) {}

    // Of 16 rows.
    __device__ const float* row_tile(int tile) const { return rows + Corner(tile, 0, height, width).in_matrix; }

    __device__ float2 get(const Corner& corner, const Place& place) const {
        return *reinterpret_cast<const float2*>(rows + corner.in_matrix + place.in_matrix);
    }
    __device__ void put_rows(const Corner& corner, const Place& place, float2 x) const {
        *reinterpret_cast<float2*>(rows + corner.in_matrix + place.in_matrix) = x;
    }
    // By a warp for an 8 x 8 part, which the lanes have as run_tiles() gives it: whole sectors of both.
    __device__ void put(const Corner& corner, const Place& place, float2 x) const {
        put_rows(corner, place, x);
        *reinterpret_cast<float2*>(columns + corner.in_transpose + place.in_transpose) = transposed(x.x, x.y);
    }
    // By a thread alone.
    __device__ void scatter(int row, int column, float x0, float x1) const {
        *reinterpret_cast<float2*>(rows + tiled(row, column, width)) = make_float2(x0, x1);
        columns[tiled(column, row, height)] = x0;
        columns[tiled(column + 1, row, height)] = x1;
    }
};

// Weights: operands as above, and the same in full precision.
struct Weights : Pair {
    float* exact;  // (height, width)

    __device__ Weights(float* data, int height_, int width_)
        : Pair(data, height_, height_, width_), exact(data + 2ll * height_ * width_) {}
};

// One problem's data in the workspace.
struct Problem {
    const Kernel& kernel;
    const Network& net;
    float* base;
    float lr, momentum;
    Head head;
    float scale;

    __device__ Problem(const Kernel& k, int index)
        : kernel(k),
          net(k.net),
          base(k.workspace + index * k.at.floats),
          lr(k.lr[index]),
          momentum(k.momentum),
          head(k.head),
          scale(k.scale) {}

    __device__ float* theta(int64_t step) const { return base + kernel.at.theta + step * net.theta; }
    __device__ float* pass(int64_t step) const { return base + kernel.at.passes + step * net.pass; }
    __device__ float* velocity() const { return base + kernel.at.velocity; }
    __device__ float* start(int64_t segment) const { return base + kernel.at.starts + 2 * segment * net.theta; }
    __device__ float* start_velocity(int64_t segment) const { return start(segment) + net.theta; }
    __device__ float* adjoint() const { return base + kernel.at.adjoint; }
    __device__ float* direction() const { return base + kernel.at.direction; }
    __device__ float* tangent() const { return base + kernel.at.tangent; }
    __device__ float* actions() const { return base + kernel.at.actions; }

    // Of a set of parameters: W of layer l (out, in), b.
    __device__ Weights weights(float* theta, int l) const {
        return {theta + net.layer[l].weights, net.layer[l].out_padded, net.layer[l].in_padded};
    }
    __device__ float* biases(float* theta, int l) const { return theta + net.layer[l].biases; }

    // Of a pass: what goes into layer l (the observations, where l is 0; they are no part of a pass), what comes out of
    // it, and the gradient before its nonlinearity.
    __device__ Pair input(float* pass, int l) const {
        return l == 0 ? rows_by(base + kernel.at.observations, net.inputs()) : output(pass, l - 1);
    }
    __device__ Pair output(float* pass, int l) const { return rows_by(pass + net.layer[l].h, net.layer[l].out_padded); }
    __device__ Pair delta(float* pass, int l) const {
        return rows_by(pass + net.layer[l].delta, net.layer[l].out_padded);
    }
    __device__ Pair rows_by(float* data, int width) const {
        return {data, net.rows_allocated(), net.rows_padded, width};
    }
    __device__ Corner corner(int row_tile, int group, int width) const {
        return {row_tile, group, net.rows_padded, width};
    }
};

}  // namespace sdw::unrolled
