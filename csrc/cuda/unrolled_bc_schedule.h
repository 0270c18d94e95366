// unrolled_bc on CUDA: where everything lies and who computes what. Plain functions of integers, for host and device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>

#include "launch.h"
#include "sdw/unrolled_bc.h"

namespace sdw::unrolled {

constexpr int kWarps = 8;  // a block
constexpr int kThreads = 32 * kWarps;
constexpr int kMaxLayers = 32;      // the kernels' parameters hold a table of them
constexpr int kCounterStride = 32;  // integers from one group's barrier counter to the next: a line of 128 bytes
constexpr int kColumns = 32;        // of a block's tile of a product
constexpr int kMaxParts = 8;        // blocks of a team

SDW_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
SDW_HOST_DEVICE constexpr int padded(int64_t n, int64_t multiple) {
    return static_cast<int>(ceil_div(n, multiple) * multiple);
}
// A number of floats rounded up to whole lines of 128 bytes.
SDW_HOST_DEVICE constexpr int64_t lines(int64_t floats) { return ceil_div(floats, 32) * 32; }

// Matrices lie in tiles of 8 x 16, 512 bytes each: lane l of a warp finds its part of a tensor-core operand, row l / 4
// and columns 4 (l % 4) to + 3, at float 4 l. Four tiles one below the other are a block of 32 x 16, 2 KiB, one row of
// blocks behind the other: what a block of threads takes of an operand for a chunk of 16 of the summed index lies
// together.
constexpr int kBlock = 512;       // floats of a block
constexpr int kStripBlock = 256;  // of half of one, 16 rows

SDW_HOST_DEVICE constexpr int tiled(int row, int column, int columns) {
    return (row / 32 * (columns / 16) + column / 16) * kBlock + row % 32 / 8 * 128 + row % 8 * 16 + column % 16;
}

// What is an operand is stored as products take it, rounded to their precision, and twice where it is one both ways:
// the matrix, and right behind it its transpose. Weights lie a third time, in full precision, behind both.
struct Layer {
    int in, out;                // widths
    int in_padded, out_padded;  // to 32
    int64_t flat;               // of W in a problem's flat parameters; b lies behind
    int64_t weights, biases;    // in a set of parameters: W (out, in) three times, b
    int64_t h, delta;           // in a pass: the layer's output h (rows, out) and its delta, twice each
};

struct Network {
    int rows, rows_padded, layers;  // padded to 16
    Layer layer[kMaxLayers];
    int64_t flat;   // floats of a problem's flat parameters
    int64_t theta;  // floats of a set of parameters
    int64_t pass;   // floats of a pass: what one step leaves for its adjoint, besides the parameters

    SDW_HOST_DEVICE int row_tiles() const { return rows_padded / 16; }
    SDW_HOST_DEVICE int rows_allocated() const { return padded(rows, 32); }
    SDW_HOST_DEVICE int inputs() const { return layer[0].in_padded; }
    SDW_HOST_DEVICE int widest() const {
        int widest = inputs();
        for (int l = 0; l < layers; ++l) widest = widest < layer[l].out_padded ? layer[l].out_padded : widest;
        return widest;
    }
    SDW_HOST_DEVICE int outputs() const { return layer[layers - 1].out_padded; }
};

inline Network make_network(const UnrolledBCParams& problem) {
    const auto& widths = problem.widths;
    if (problem.problems < 1 || problem.rows < 1 || widths.size() < 2 ||
        *std::min_element(widths.begin(), widths.end()) < 1)
        throw std::invalid_argument("unrolled_bc: the CUDA kernel needs at least one problem, row, layer and column");
    if (widths.size() > kMaxLayers + 1)
        throw std::invalid_argument("unrolled_bc: the CUDA kernel takes at most 32 layers; use backend=\"torch\"");
    const int64_t widest = *std::max_element(widths.begin(), widths.end());
    if (2 * (std::max(problem.rows, widest) + 32) * (widest + 32) > INT32_MAX)
        throw std::invalid_argument(
            "unrolled_bc: the CUDA kernel takes matrices of up to 2^30 numbers; use fewer rows");
    Network net{};
    net.rows = static_cast<int>(problem.rows);
    net.rows_padded = padded(problem.rows, 16);
    net.layers = static_cast<int>(widths.size()) - 1;
    for (int l = 0; l < net.layers; ++l) {
        Layer& layer = net.layer[l];
        layer.in = static_cast<int>(widths[l]);
        layer.out = static_cast<int>(widths[l + 1]);
        layer.in_padded = padded(layer.in, kColumns);
        layer.out_padded = padded(layer.out, kColumns);
        layer.flat = net.flat;
        net.flat += static_cast<int64_t>(layer.out) * (layer.in + 1);
        layer.weights = net.theta;
        layer.biases = net.theta + 3ll * layer.out_padded * layer.in_padded;
        net.theta = lines(layer.biases + layer.out_padded);
        layer.h = net.pass;
        layer.delta = net.pass + 2ll * net.rows_allocated() * layer.out_padded;
        net.pass = layer.delta + 2ll * net.rows_allocated() * layer.out_padded;
    }
    return net;
}

// How the window is cut: the tape holds the steps of one segment at a time, and parameters at the start of each.
struct Plan {
    int64_t lead_in;   // steps before the window, which leave no tape
    int64_t window;    // steps of the window
    int64_t length;    // steps of a segment, the last may be shorter
    int64_t segments;  // one: all steps are on the tape, nothing is run again; none: no tape

    SDW_HOST_DEVICE int64_t steps(int64_t segment) const {
        const int64_t left = window - segment * length;
        return left < length ? left : length;
    }
};

inline Plan make_plan(const UnrolledBCParams& problem) {
    if (problem.window < 1 || problem.window > problem.steps)
        throw std::invalid_argument("unrolled_bc: 1 <= window <= steps is required");
    if (!problem.keep_tape) return {problem.steps, 0, 0, 0};
    int64_t length = problem.window;
    if (problem.recompute) {
        length = 1;
        while (length * length < problem.window) ++length;
    }
    return {problem.steps - problem.window, problem.window, length, ceil_div(problem.window, length)};
}

// A problem's part of the workspace: offsets in floats.
struct Layout {
    int64_t observations;  // h of layer -1: (rows, inputs) twice
    int64_t actions;       // (rows, outputs)
    int64_t theta;         // parameters before each step of the segment, and after the last
    int64_t passes;        // of each step of the segment
    int64_t velocity;      // u, as parameters in full precision; as lambda unused without momentum
    int64_t starts;        // parameters and velocity at the start of each segment, if there are several
    int64_t adjoint;       // lambda, as parameters
    int64_t direction;     // v, as parameters
    int64_t tangent;       // R h and R delta, as a pass
    int64_t observations_gradient, actions_gradient, lr_terms;  // (rows, inputs), (rows, outputs), (rows, outputs)
    int64_t floats;
};

inline Layout make_layout(const Network& net, const Plan& plan) {
    Layout at{};
    int64_t next = 0;
    const auto take = [&](int64_t floats) { return std::exchange(next, next + lines(floats)); };
    const int64_t rows = net.rows_allocated();
    at.observations = take(2 * rows * net.inputs());
    at.actions = take(rows * net.outputs());
    at.theta = take((plan.length + 1) * net.theta);
    at.passes = take(std::max<int64_t>(plan.length, 1) * net.pass);
    at.velocity = take(net.theta);
    at.starts = take(plan.segments > 1 ? 2 * plan.segments * net.theta : 0);
    if (plan.segments > 0) {
        at.adjoint = take(net.theta);
        at.direction = take(net.theta);
        at.tangent = take(net.pass);
        at.observations_gradient = take(rows * net.inputs());
        at.actions_gradient = take(rows * net.outputs());
        at.lr_terms = take(rows * net.outputs());
    }
    at.floats = next;
    return at;
}

// A block's tile of a layer's weight gradient: 32 x 32. All of them are counted through all layers.
constexpr int kWeightRows = 32;

SDW_HOST_DEVICE constexpr int weight_tiles(const Layer& layer) {
    return layer.out_padded / kWeightRows * (layer.in_padded / kColumns);
}
SDW_HOST_DEVICE constexpr int weight_tiles(const Network& net) {
    int tiles = 0;
    for (int l = 0; l < net.layers; ++l) tiles += weight_tiles(net.layer[l]);
    return tiles;
}

struct WeightTile {
    int layer;        // net.layers: there is no such tile
    int row, column;  // of the first element
};

SDW_HOST_DEVICE constexpr WeightTile weight_tile(const Network& net, int index) {
    for (int l = 0; l < net.layers; ++l) {
        const int tiles = weight_tiles(net.layer[l]);
        if (index < tiles) {
            const int across = net.layer[l].in_padded / kColumns;
            return {l, index / across * kWeightRows, index % across * kColumns};
        }
        index -= tiles;
    }
    return {net.layers, 0, 0};
}

// A problem is run by a group of blocks; a group that has finished takes the next problem. Within a group, a team of
// blocks (a cluster) shares tiles of 16 rows: each computes a part of the columns of every product. Teams beyond the
// last tile of rows help with the weight gradients.
struct Groups {
    int groups;
    int members;  // blocks of a group
    int parts;    // blocks of a team: 1, 2, 4 or 8
};

// resident[i]: blocks that the device holds in clusters of 2^i.
inline Groups make_groups(int64_t problems, const Network& net, const int (&resident)[4]) {
    if (resident[0] < 1) throw std::runtime_error("unrolled_bc: the device cannot hold one block of the kernel");
    const int64_t tiles = net.row_tiles();
    const int teams = static_cast<int>(std::min<int64_t>(tiles, resident[0]));
    Groups result{static_cast<int>(std::min<int64_t>(problems, resident[0] / teams)), teams, 1};
    for (int i = 0; i < 4; ++i) {
        const int parts = 1 << i;
        const int64_t room = resident[i] / parts / problems;  // teams a problem
        // Worth it where all problems still run at once and no block of a team stays without columns in the widest
        // layer.
        if (room < tiles || (parts > 1 && net.widest() < kColumns * parts)) continue;
        const int64_t wanted = std::max(tiles, ceil_div(weight_tiles(net), parts));
        result = {static_cast<int>(problems), static_cast<int>(std::min(room, wanted)) * parts, parts};
    }
    return result;
}

}  // namespace sdw::unrolled
