// Register-blocked single-precision products on matrices stored in panels, with the epilogue fused.
//
// A matrix lies in panels of kPanel columns, a panel's rows one after the other: element (r, c) is at
//     data[(c / kPanel) * stride + r * kPanel + c % kPanel].
// Every operand of every product of an MLP is then read in order, without repacking between them: the right operand
// kPanel columns wide and inner-index-major, the left one either row by row (activations times weights) or, as the
// transposed left operand of a weight gradient, column by column.
//
// A tile of M rows and one panel (two vectors) is held in registers while the inner index runs: 2 loads and M
// broadcasts for 2 M fused multiply-adds. Widths that are no multiple of a panel leave columns that are zero in all
// operands and so stay zero; a last panel no wider than one vector is computed with one.
#pragma once

#include <algorithm>
#include <type_traits>

#include "range.h"
#include "simd.h"

namespace sdw::SDW_ISA {

constexpr int kPanel = 2 * kLanes;
#if defined(__AVX512F__)
constexpr int kRowTile = 8;  // rows of a tile whose left operand is read by rows
constexpr int kColTile = 8;  // and by columns: divides kPanel
#elif defined(__AVX2__)
constexpr int kRowTile = 6;
constexpr int kColTile = 4;
#else
constexpr int kRowTile = 4;
constexpr int kColTile = 4;
#endif

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

struct Matrix {
    float* data;
    int64_t stride;  // floats from panel to panel

    float* panel(int64_t index) const { return data + index * stride; }
    float* at(int64_t row, int64_t column) const {
        return data + column / kPanel * stride + row * kPanel + column % kPanel;
    }
};

template <int M, int V>
using Tile = Vec[M][V];

// acc += A[row : row + M, 0 : inner] B, B the `inner` rows of one panel.
template <int M, int V>
inline __attribute__((always_inline)) void multiply(Tile<M, V>& acc, const Matrix& a, int64_t row, const float* b,
                                                    int64_t inner) {
    for (int64_t first = 0; first < inner; first += kPanel) {
        const float* left = a.data + first / kPanel * a.stride + row * kPanel;
        const float* right = b + first * kPanel;
        const int count = static_cast<int>(std::min<int64_t>(kPanel, inner - first));
#pragma GCC unroll 2
        for (int k = 0; k < count; ++k) {
            Vec x[V];
            for (int v = 0; v < V; ++v) x[v] = load(right + k * kPanel + v * kLanes);
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) {
                const Vec y = broadcast(left[m * kPanel + k]);
                for (int v = 0; v < V; ++v) acc[m][v] += y * x[v];
            }
        }
    }
}

// acc += A[0 : inner, column : column + M]ᵀ B, B the `inner` rows of one panel.
template <int M, int V>
inline __attribute__((always_inline)) void multiply_transposed(Tile<M, V>& acc, const Matrix& a, int64_t column,
                                                               const float* b, int64_t inner) {
    const float* left = a.at(0, column);
#pragma GCC unroll 2
    for (int64_t k = 0; k < inner; ++k) {
        Vec x[V];
        for (int v = 0; v < V; ++v) x[v] = load(b + k * kPanel + v * kLanes);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const Vec y = broadcast(left[k * kPanel + m]);
            for (int v = 0; v < V; ++v) acc[m][v] += y * x[v];
        }
    }
}

// Left and right operand of a product and their inner length. Several terms make one product with a longer inner
// length.
struct Term {
    Matrix left, right;
    int64_t inner;
};

template <int M, int V, typename Epilogue>
inline void finish(const Tile<M, V>& acc, int64_t offset, int64_t column, const Epilogue& epilogue) {
    for (int m = 0; m < M; ++m) {
        for (int v = 0; v < V; ++v) epilogue(acc[m][v], offset + m * kPanel + v * kLanes, column + v * kLanes);
    }
}

// Calls body(std::integral_constant<int, vectors in use>) for a panel that is `columns` wide at most.
template <typename Body>
inline void with_vectors(int64_t columns, const Body& body) {
    if (columns > kLanes) {
        body(std::integral_constant<int, 2>{});
    } else {
        body(std::integral_constant<int, 1>{});
    }
}

// Σ_terms left · right for some rows, multiples of kRowTile, and columns [0, columns). Calls epilogue(vector, its
// offset in matrices of this stride, its first column) for each vector of the result.
template <int Terms, typename Epilogue>
inline void product(const Term (&terms)[Terms], Range rows, int64_t columns, int64_t stride, const Epilogue& epilogue) {
    for (int64_t panel = 0; panel < panels(columns); ++panel) {
        with_vectors(columns - panel * kPanel, [&](auto vectors) {
            constexpr int V = decltype(vectors)::value;
            for (int64_t row = rows.begin; row < rows.end; row += kRowTile) {
                Tile<kRowTile, V> acc{};
                for (const Term& term : terms)
                    multiply<kRowTile, V>(acc, term.left, row, term.right.panel(panel), term.inner);
                finish<kRowTile, V>(acc, panel * stride + row * kPanel, panel * kPanel, epilogue);
            }
        });
    }
}

// Σ_terms leftᵀ · right, rows [rows.begin, rows.end) in tiles of kColTile and one panel of it, `columns` of which are
// in use. Calls epilogue(vector, its offset in a matrix of this stride, its first column) for each vector, then
// done(row) for each tile.
template <int Terms, typename Epilogue, typename Done>
inline void transposed_product(const Term (&terms)[Terms], Range rows, int64_t panel, int64_t columns, int64_t stride,
                               const Epilogue& epilogue, const Done& done) {
    with_vectors(columns, [&](auto vectors) {
        constexpr int V = decltype(vectors)::value;
        for (int64_t row = rows.begin; row < rows.end; row += kColTile) {
            Tile<kColTile, V> acc{};
            for (const Term& term : terms)
                multiply_transposed<kColTile, V>(acc, term.left, row, term.right.panel(panel), term.inner);
            finish<kColTile, V>(acc, panel * stride + row * kPanel, panel * kPanel, epilogue);
            done(row);
        }
    });
}

// Transposes the kColTile rows of `from` that begin at `row`, in one panel, into `to`: to(c, r) = from(r, c).
inline void transpose_tile(const Matrix& from, const Matrix& to, int64_t row, int64_t panel) {
    constexpr int T = kColTile;
    typedef float Line __attribute__((vector_size(4 * T), may_alias));
    typedef int32_t Index __attribute__((vector_size(4 * T)));
    const float* source = from.panel(panel) + row * kPanel;
    float* target = to.at(panel * kPanel, row);
    for (int first = 0; first < kPanel; first += T) {
        Line lines[T];
        for (int i = 0; i < T; ++i) lines[i] = *reinterpret_cast<const Line*>(source + i * kPanel + first);
        // Blocks of `half` rows and columns change places, half = T/2, …, 1 (Eklundh).
#pragma GCC unroll 3
        for (int half = T / 2; half > 0; half /= 2) {
            Index low, high;
            for (int j = 0; j < T; ++j) {
                low[j] = (j & half) ? T + j - half : j;
                high[j] = (j & half) ? T + j : j + half;
            }
#pragma GCC unroll 8
            for (int i = 0; i < T; ++i) {
                if (i & half) continue;
                const Line a = lines[i], b = lines[i + half];
                lines[i] = shuffled(a, b, low);
                lines[i + half] = shuffled(a, b, high);
            }
        }
        for (int i = 0; i < T; ++i) *reinterpret_cast<Line*>(target + (first + i) * kPanel) = lines[i];
    }
}

// The whole of it; the padding of both must be rows and columns up to full panels.
inline void transpose(const Matrix& from, int64_t rows, int64_t columns, const Matrix& to) {
    for (int64_t panel = 0; panel < panels(columns); ++panel) {
        for (int64_t row = 0; row < rows; row += kColTile) transpose_tile(from, to, row, panel);
    }
}

}  // namespace sdw::SDW_ISA
