// The ReLU MLP in packed matrices: what unrolled_bc and behavior_matching share.
//
// Layer l takes h[l] (rows, widths[l]) to h[l + 1] by W[l] (widths[l], widths[l + 1]); h[0] is the input, h[L] the
// output. delta[l] is the gradient for the pre-activation of h[l], l = 1 ... L.
//
// Work is shared out in two ways, and a barrier lies between them. Rows: a member takes its rows through all layers,
// there and back, alone. Strips: a member computes tiles of weight gradients over all rows; as no tile is ever summed
// by two members, nothing needs a reduction and the result does not depend on their number.
#pragma once

#include <cstring>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "gated_product.h"
#include "head.h"
#include "product.h"
#include "team.h"

namespace sdw::SDW_ISA {

// Hands out parts of one block. Over a null block it only counts, so that one function both sizes and lays out.
class Arena {
  public:
    explicit Arena(float* block) : block_(block) {}
    float* take(int64_t floats) {
        float* part = block_ == nullptr ? nullptr : block_ + used_;
        used_ += round_up(floats, 16);
        return part;
    }
    size_t bytes() const { return static_cast<size_t>(used_) * sizeof(float); }

  private:
    float* block_;
    int64_t used_ = 0;
};

// Parameters, or a direction in their space.
struct Weights {
    std::vector<Matrix> matrices;  // W[l], rows padded to panels
    std::vector<float*> biases;    // b[l], padded to panels
};

// What a forward and backward pass over some rows leaves. Entries that a pass does not have are null.
struct Pass {
    std::vector<Matrix> h;      // L + 1
    std::vector<Matrix> delta;  // L + 1, the first unused
};

// A part of a layer's weight matrix: rows, multiples of kColTile, of one panel; or, if the layer's inputs are gated,
// panels of one panel's height of rows. The strip that begins at row 0 has the bias too.
struct Strip {
    int layer;
    Range rows, columns;
};

class Mlp {
  public:
    Mlp(std::vector<int64_t> layer_widths, int64_t row_count)
        : widths(std::move(layer_widths)),
          layers(static_cast<int>(widths.size()) - 1),
          rows(row_count),
          tiles((rows + kRowTile - 1) / kRowTile),
          stride(tiles * kRowTile * kPanel) {}

    const std::vector<int64_t> widths;
    const int layers;
    const int64_t rows;    // in use; those that pad the last tile hold numbers that nothing reads
    const int64_t tiles;   // of kRowTile rows
    const int64_t stride;  // of every matrix with a row a state

    // Of a pass over this many rows: forward, backward, and the weights' gradients.
    int64_t multiplications() const {
        int64_t weights = 0;
        for (int l = 0; l < layers; ++l) weights += widths[l] * widths[l + 1];
        return 3 * rows * weights;
    }

    // Threads worth their barriers (a microsecond each) in passes that share out this many rows.
    int useful_threads(int threads) const {
        return static_cast<int>(std::min<int64_t>(threads, 1 + multiplications() / 200'000));
    }

    Matrix take_rows(Arena& arena, int64_t columns) const { return {arena.take(panels(columns) * stride), stride}; }

    Weights take_weights(Arena& arena) const {
        Weights weights;
        for (int l = 0; l < layers; ++l) weights.matrices.push_back(take_matrix(arena, widths[l], widths[l + 1]));
        for (int l = 0; l < layers; ++l) weights.biases.push_back(arena.take(panels(widths[l + 1]) * kPanel));
        return weights;
    }

    // W[l]ᵀ, (widths[l + 1], widths[l]).
    std::vector<Matrix> take_transposed(Arena& arena) const {
        std::vector<Matrix> transposed;
        for (int l = 0; l < layers; ++l) transposed.push_back(take_matrix(arena, widths[l + 1], widths[l]));
        return transposed;
    }

    // Activations and deltas of all layers but the input.
    Pass take_pass(Arena& arena, Matrix input) const {
        Pass pass{{input}, {Matrix{}}};
        for (int l = 1; l <= layers; ++l) {
            pass.h.push_back(take_rows(arena, widths[l]));
            pass.delta.push_back(take_rows(arena, widths[l]));
        }
        return pass;
    }

    // Whether h[l] gates the products over its units, or over rows for its units, that have this many columns.
    bool gated(int l, int64_t columns) const {
        return kGatingPays && l > 0 && l < layers && std::min(widths[l], columns) >= kGateWidth;
    }

    // One for each member; empty ones where no layer is gated.
    std::vector<GateLists> gate_lists(int members) const {
        int64_t width = 0;
        for (int l = 1; l < layers; ++l) {
            if (gated(l, std::max(widths[l - 1], widths[l + 1]))) width = std::max(width, widths[l]);
        }
        return std::vector<GateLists>(members, GateLists(width > 0 ? tiles * kRowTile : 0, width));
    }

    // The strips of each member, about equal in work, in an order that keeps a panel of deltas in cache, or of gates.
    std::vector<std::vector<Strip>> strips(int members) const {
        std::vector<Strip> parts;
        std::vector<int64_t> costs;
        for (int l = 0; l < layers; ++l) {
            const int64_t in = round_up(widths[l], kColTile), out = widths[l + 1];
            const bool gate = gated(l, out);
            const int64_t height = gate ? kPanel : kColTile, width = gate ? kGroup * kPanel : kPanel;
            const int64_t outer = gate ? in : out, inner = gate ? out : in;
            for (int64_t i = 0; i < outer; i += gate ? height : width) {
                for (int64_t j = 0; j < inner; j += gate ? width : height) {
                    const int64_t row = gate ? i : j, column = gate ? j : i;
                    parts.push_back({l, {row, std::min(in, row + height)}, {column, std::min(out, column + width)}});
                    const Strip& part = parts.back();
                    costs.push_back((part.rows.end - part.rows.begin) *
                                    round_up(part.columns.end - part.columns.begin, kLanes) * (gate ? 3 : 5));
                }
            }
        }
        const int64_t total = std::accumulate(costs.begin(), costs.end(), int64_t{0});
        std::vector<std::vector<Strip>> shares(members);
        int64_t done = 0;
        for (size_t i = 0; i < parts.size(); ++i) {
            std::vector<Strip>& share = shares[done * members / total];
            done += costs[i];
            if (share.empty() || !joined(share.back(), parts[i])) share.push_back(parts[i]);
        }
        return shares;
    }

    // product() of terms that sum over the units of h[l].
    template <int Terms, typename Epilogue>
    void multiply_rows(GateLists& lists, const Pass& pass, int l, const Term (&terms)[Terms], Range range,
                       int64_t columns, const Epilogue& epilogue) const {
        if (gated(l, columns)) {
            gated_product(lists, pass.h[l], terms, range, columns, stride, epilogue);
        } else {
            product(terms, range, columns, stride, epilogue);
        }
    }

    // transposed_product() of terms whose left operands are zero where h[strip.layer] is; done(row, panel).
    template <int Terms, typename Epilogue, typename Done>
    void multiply_columns(GateLists& lists, const Pass& pass, const Strip& strip, const Term (&terms)[Terms],
                          int64_t result_stride, const Epilogue& epilogue, const Done& done) const {
        if (gated(strip.layer, widths[strip.layer + 1])) {
            gated_transposed_product(lists, pass.h[strip.layer], terms, strip.rows, strip.columns, result_stride,
                                     epilogue, done);
        } else {
            const int64_t panel = strip.columns.begin / kPanel;
            transposed_product(terms, strip.rows, panel, strip.columns.end - strip.columns.begin, result_stride,
                               epilogue, [&](int64_t row) { done(row, panel); });
        }
    }

    // h[1 … L-1] for some rows, and into h[L] the pre-activation of the output.
    void forward(GateLists& lists, const Weights& weights, const Pass& pass, Range range) const {
        for (int l = 0; l < layers; ++l) {
            const float* bias = weights.biases[l];
            float* out = pass.h[l + 1].data;
            const Vec floor = broadcast(l + 1 < layers ? 0.0f : -std::numeric_limits<float>::infinity());
            const Term terms[] = {{pass.h[l], weights.matrices[l], widths[l]}};
            multiply_rows(lists, pass, l, terms, range, widths[l + 1], [=](Vec x, int64_t offset, int64_t column) {
                x += load(bias + column);
                store(out + offset, x < floor ? floor : x);
            });
        }
    }

    // delta[L-1 … 1] from delta[L] for some rows.
    void backward(GateLists& lists, const std::vector<Matrix>& transposed, const Pass& pass, Range range) const {
        for (int l = layers - 1; l > 0; --l) {
            const float* h = pass.h[l].data;
            float* out = pass.delta[l].data;
            const Term terms[] = {{pass.delta[l + 1], transposed[l], widths[l + 1]}};
            multiply_rows(lists, pass, l + 1, terms, range, widths[l],
                          [=](Vec x, int64_t offset, int64_t) { store(out + offset, masked(x, load(h + offset))); });
        }
    }

    // Calls body(row) for some rows of the output.
    template <typename Body>
    void for_each_output(Range range, const Body& body) const {
        for (int64_t row = range.begin; row < range.end; ++row) body(OutputRow{row, widths[layers], stride});
    }

    // Σ over all rows of the columns of `delta` that are the strip's; calls body(vector, its first column).
    template <typename Body>
    void for_each_bias(const Matrix& delta, const Strip& strip, const Body& body) const {
        for (int64_t column = strip.columns.begin; column < strip.columns.end; column += kLanes) {
            const float* at = delta.at(0, column);
            Vec sum[4] = {};
            int64_t row = 0;
            for (; row + 4 <= rows; row += 4) {
                for (int i = 0; i < 4; ++i) sum[i] += load(at + (row + i) * kPanel);
            }
            for (; row < rows; ++row) sum[0] += load(at + row * kPanel);
            body((sum[0] + sum[1]) + (sum[2] + sum[3]), column);
        }
    }

  private:
    // Appends a part to a strip if the two make one rectangle of the strip's kind.
    bool joined(Strip& strip, const Strip& part) const {
        if (strip.layer != part.layer) return false;
        if (gated(part.layer, widths[part.layer + 1])) {
            if (strip.rows.begin != part.rows.begin) return false;
            strip.columns.end = part.columns.end;
        } else {
            if (strip.columns.begin != part.columns.begin) return false;
            strip.rows.end = part.rows.end;
        }
        return true;
    }

    static Matrix take_matrix(Arena& arena, int64_t matrix_rows, int64_t columns) {
        const int64_t matrix_stride = round_up(matrix_rows, kPanel) * kPanel;
        return {arena.take(panels(columns) * matrix_stride), matrix_stride};
    }
};

// A row's numbers in one panel. As many as a constant where the panel is full: no call is made to copy a cache line.
inline void copy_in_panel(float* to, const float* from, int64_t count) {
    if (count == kPanel) {
        std::memcpy(to, from, kPanel * sizeof(float));
    } else {
        std::memcpy(to, from, count * sizeof(float));
    }
}

// Rows of a plain row-major matrix (…, columns) into panels, and back.
inline void pack(const float* plain, int64_t columns, Range range, const Matrix& packed) {
    for (int64_t row = range.begin; row < range.end; ++row) {
        for (int64_t first = 0; first < columns; first += kPanel) {
            const int64_t count = std::min<int64_t>(kPanel, columns - first);
            copy_in_panel(packed.at(row, first), plain + row * columns + first, count);
        }
    }
}

inline void unpack(const Matrix& packed, int64_t columns, Range range, float* plain) {
    for (int64_t row = range.begin; row < range.end; ++row) {
        for (int64_t first = 0; first < columns; first += kPanel) {
            const int64_t count = std::min<int64_t>(kPanel, columns - first);
            copy_in_panel(plain + row * columns + first, packed.at(row, first), count);
        }
    }
}

// Zeroes what pads a matrix of this many rows and columns to panels, and to its stride.
inline void zero_padding(const Matrix& matrix, int64_t rows, int64_t columns) {
    for (int64_t panel = 0; panel < panels(columns); ++panel) {
        const bool full = (panel + 1) * kPanel <= columns;
        std::fill(matrix.panel(panel) + (full ? rows * kPanel : 0), matrix.panel(panel) + matrix.stride, 0.0f);
    }
}

inline void zero_padding(const Mlp& mlp, const Weights& weights, const std::vector<Matrix>& transposed) {
    for (int l = 0; l < mlp.layers; ++l) {
        const int64_t in = mlp.widths[l], out = mlp.widths[l + 1];
        zero_padding(weights.matrices[l], in, out);
        zero_padding(transposed[l], out, in);
        std::fill(weights.biases[l] + out, weights.biases[l] + panels(out) * kPanel, 0.0f);
    }
}

// Flat parameters (sdw/flat.h) into both packed forms, and back. Padding must have been zeroed before.
inline void pack_weights(const Mlp& mlp, const float* flat, const Weights& weights,
                         const std::vector<Matrix>& transposed) {
    for (int l = 0; l < mlp.layers; ++l) {
        const int64_t in = mlp.widths[l], out = mlp.widths[l + 1];
        pack(flat, in, {0, out}, transposed[l]);
        transpose(transposed[l], out, in, weights.matrices[l]);
        std::memcpy(weights.biases[l], flat + out * in, out * sizeof(float));
        flat += out * (in + 1);
    }
}

inline void unpack_weights(const Mlp& mlp, const Weights& weights, const std::vector<Matrix>& transposed, float* flat) {
    for (int l = 0; l < mlp.layers; ++l) {
        const int64_t in = mlp.widths[l], out = mlp.widths[l + 1];
        unpack(transposed[l], in, {0, out}, flat);
        std::memcpy(flat + out * in, weights.biases[l], out * sizeof(float));
        flat += out * (in + 1);
    }
}

}  // namespace sdw::SDW_ISA
