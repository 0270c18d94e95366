// Products that leave out the zeros of a ReLU.
//
// About half of what a hidden layer hands on is zero, through a whole unroll, and δ, R h and R δ are zero in the same
// places: where the layer's activation h, the *gate*, is. So a sum over a hidden layer's units, or
// over the rows that they are on for, has half as many terms as the plain product of product.h computes.
//
//     C[r, :] = Σ_{i on for r} left(r, i) · right[i, :]
//
// A row of C is summed alone, since no two rows are on in the same places: one load of `right` for each multiply-add,
// where a tile of eight rows needs one for eight. What makes it pay is that these loads come from the first-level
// cache: kGroup panels wide, `right` is taken in slabs of 16 KB, and the rows pass over a slab before the next.
// A row's list of places (two bytes each) is made once and read for all panels and for both terms of a joined product.
//
// The terms of a sum come in the order of the plain product, and adding 0 · x changes no bit: the results are those of
// product.h, so that the density of the gate may decide which of the two runs.
#pragma once

#include <vector>

#include "product.h"

namespace sdw::SDW_ISA {

#if defined(__AVX512F__)
constexpr int kGroup = 2;  // panels computed together
#else
constexpr int kGroup = 4;
#endif
// Inner indices of a slab, a multiple of kPanel: 16 KB, half a first-level cache, whose other half another hyperthread
// may want.
constexpr int kDepth = 64;
constexpr int kChunk = 128 / kRowTile * kRowTile;  // rows whose lists and partial sums are held at a time
constexpr int kLineBytes = 4 * kPanel;
// With AVX-512, where one instruction makes a list, and from this width on; with AVX2 making lists eats the gain.
constexpr bool kGatingPays = kLanes == 16;
constexpr int64_t kGateWidth = 64;
constexpr double kMaxDensity = 0.62;  // above it the plain product is as fast

// One thread's working memory, on cache lines of its own.
class alignas(64) GateLists {
  public:
    // For products of matrices with `rows` rows and layers no wider than `width`.
    GateLists(int64_t rows, int64_t width)
        : bits_(rows + kPanel),
          places_(std::max(kChunk * capacity(width), kPanel * capacity(rows))),
          counts_(std::max(kChunk * slabs_of(width), kPanel * slabs_of(rows))),
          partial_(kChunk * kGroup * kLineBytes / sizeof(CacheLine)) {}

    // Lists, for some rows of the gate, the columns in [0, columns) that are on. False: too many for a gated product.
    bool list_rows(const Matrix& gate, Range rows, int64_t columns) {
        begin(rows.end - rows.begin, columns);
        int64_t total = 0;
        for (int64_t row = rows.begin; row < rows.end; ++row) {
            for (int64_t first = 0; first < columns; first += kPanel) {
                const uint32_t on = nonzeros(gate.panel(first / kPanel) + row * kPanel) & low_bits(columns - first);
                total += append(row - rows.begin, first, on);
            }
        }
        return total <= kMaxDensity * (rows.end - rows.begin) * columns;
    }

    // Lists, for some columns of the gate in one panel, which begins with them, the rows in [0, rows) that are on.
    bool list_columns(const Matrix& gate, Range columns, int64_t rows) {
        begin(columns.end - columns.begin, rows);
        int64_t total = 0;
        for (int64_t row = 0; row < rows; ++row) {
            bits_[row] = nonzeros(gate.at(row, columns.begin));
            total += __builtin_popcount(bits_[row]);
        }
        if (total > kMaxDensity * rows * kPanel) return false;
        std::fill_n(bits_.begin() + rows, round_up(rows, kPanel) - rows, 0);
        for (int64_t first = 0; first < rows; first += kPanel) {
            transpose_bits(&bits_[first]);
            for (int64_t column = 0; column < lists_; ++column) append(column, first, bits_[first + column]);
        }
        return true;
    }

    // The list of a row of C in one slab.
    const uint16_t* places(int64_t row, int64_t slab) const {
        return &places_[(row * slabs_ + slab) * (kDepth + kLanes)];
    }
    int64_t count(int64_t row, int64_t slab) const { return counts_[row * slabs_ + slab]; }
    int64_t lists() const { return lists_; }
    int64_t slabs() const { return slabs_; }
    // Sums of one group so far, [row][column].
    float* partial(int64_t row) { return reinterpret_cast<float*>(partial_.data()) + row * kGroup * kPanel; }

  private:
    struct alignas(64) CacheLine {
        float numbers[16];
    };

    // Places of a list; kLanes more a slab, since append_lanes writes whole vectors.
    static int64_t capacity(int64_t inner) { return slabs_of(inner) * (kDepth + kLanes); }
    static int64_t slabs_of(int64_t inner) { return (inner + kDepth - 1) / kDepth; }

    static uint32_t low_bits(int64_t count) { return count >= kPanel ? ~0u >> (32 - kPanel) : (1u << count) - 1; }

    // One bit an element of a panel's row. NaN counts as on, so that it spreads as in the plain product.
    static uint32_t nonzeros(const float* row) {
        return nonzero_lanes(load(row)) | nonzero_lanes(load(row + kLanes)) << kLanes;
    }

    // Bit j of bits[i] changes places with bit i of bits[j], in blocks of half the size each time.
    static void transpose_bits(uint32_t* bits) {
        uint32_t mask = ~0u >> (32 - kPanel / 2);
        for (int half = kPanel / 2; half > 0; half /= 2, mask ^= mask << half) {
            for (int i = 0; i < kPanel; ++i) {
                if (i & half) continue;
                const uint32_t swap = (bits[i] >> half ^ bits[i + half]) & mask;
                bits[i] ^= swap << half;
                bits[i + half] ^= swap;
            }
        }
    }

    void begin(int64_t lists, int64_t inner) {
        lists_ = lists;
        slabs_ = slabs_of(inner);
        std::fill_n(counts_.begin(), lists * slabs_, 0);
    }

    // Adds the places first + (bits that are on) to a list; `first` is a multiple of kPanel.
    int append(int64_t list, int64_t first, uint32_t on) {
        const int64_t slab = first / kDepth;
        uint16_t& count = counts_[list * slabs_ + slab];
        uint16_t* out = &places_[(list * slabs_ + slab) * (kDepth + kLanes)] + count;
        const int added = __builtin_popcount(on);
        const int origin = static_cast<int>(first - slab * kDepth);
        const uint32_t low = on & (~0u >> (32 - kLanes));
        append_lanes(out, low, origin, kLineBytes);
        append_lanes(out + __builtin_popcount(low), on >> kLanes, origin + kLanes, kLineBytes);
        count = static_cast<uint16_t>(count + added);
        return added;
    }

    int64_t lists_ = 0, slabs_ = 0;
    std::vector<uint32_t> bits_;
    std::vector<uint16_t> places_;  // inner index within the slab, times kLineBytes: the offset of its line in a panel
    std::vector<uint16_t> counts_;
    std::vector<CacheLine> partial_;
};

// Where a row of C finds its left numbers. line: that of the row's first place; from row to row it moves on by kStep.
struct UnitsOfRow {  // C is a pass over rows: places are units, which lie kPanel to a panel
    int64_t panel_bytes;
    static constexpr int64_t kStep = kLineBytes;
    const float* operator()(const char* line, int64_t place) const {
        return reinterpret_cast<const float*>(line + place / (kLineBytes * kPanel) * panel_bytes) +
               place / kLineBytes % kPanel;
    }
};
struct RowsOfUnit {  // C is a weight gradient: places are rows, one line after the other
    static constexpr int64_t kStep = sizeof(float);
    const float* operator()(const char* line, int64_t place) const {
        return reinterpret_cast<const float*>(line + place);
    }
};

// partial += Σ_places left · right over one slab, P panels of `right`, all rows of C. Not inlined: its loop needs every
// register there is.
template <int P, typename Left>
__attribute__((noinline)) void gather_slab(GateLists& lists, int64_t slab, bool first, const char* line, Left left,
                                           const char* const (&panels)[P]) {
    const int64_t rows = lists.lists(), apart = lists.places(1, 0) - lists.places(0, 0);
    const uint16_t* places = lists.places(0, slab);
    float* sums = lists.partial(0);
    for (int64_t row = 0; row < rows; ++row, places += apart, sums += kGroup * kPanel, line += Left::kStep) {
        const uint16_t* place = places;
        const uint16_t* const end = places + lists.count(row, slab);
        Tile<P, 2> acc{};
        if (!first) {
            for (int p = 0; p < P; ++p) {
                for (int v = 0; v < 2; ++v) acc[p][v] = load(sums + p * kPanel + v * kLanes);
            }
        }
        for (; place != end; ++place) {
            const Vec y = broadcast_scalar_load(left(line, *place));
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) {
                const auto* x = reinterpret_cast<const float*>(panels[p] + *place);
                acc[p][0] += y * load(x);
                acc[p][1] += y * load(x + kLanes);
            }
        }
        for (int p = 0; p < P; ++p) {
            for (int v = 0; v < 2; ++v) store(sums + p * kPanel + v * kLanes, acc[p][v]);
        }
    }
}

// All rows of C, `P` panels of it from `panel`; first_line(left operand, first inner index of a slab) is that of the
// first row. Calls epilogue(vector, row, panel, its first column in the panel).
template <int P, int Terms, typename Left, typename Line, typename Epilogue>
void gather_group(GateLists& lists, const Term (&terms)[Terms], int64_t panel, const Left& left, const Line& first_line,
                  const Epilogue& epilogue) {
    const int64_t slabs = lists.slabs();
    for (int64_t pass = 0; pass < Terms * slabs; ++pass) {
        const Term& term = terms[pass / slabs];
        const int64_t slab = pass % slabs;
        const char* panels[P];
        for (int p = 0; p < P; ++p)
            panels[p] = reinterpret_cast<const char*>(term.right.panel(panel + p)) + slab * kDepth * kLineBytes;
        gather_slab<P>(lists, slab, pass == 0, first_line(term.left, slab * kDepth), left, panels);
    }
    for (int64_t row = 0; row < lists.lists(); ++row) {
        for (int p = 0; p < P; ++p) {
            for (int v = 0; v < 2; ++v)
                epilogue(load(lists.partial(row) + p * kPanel + v * kLanes), row, panel + p, v * kLanes);
        }
    }
}

template <int Terms, typename Left, typename Line, typename Epilogue>
void gather_panels(GateLists& lists, const Term (&terms)[Terms], Range range, const Left& left, const Line& first_line,
                   const Epilogue& epilogue) {
    int64_t panel = range.begin;
    for (; panel + kGroup <= range.end; panel += kGroup)
        gather_group<kGroup>(lists, terms, panel, left, first_line, epilogue);
    for (; panel < range.end; ++panel) gather_group<1>(lists, terms, panel, left, first_line, epilogue);
}

// product() of terms whose left operands are zero where `gate` is.
template <int Terms, typename Epilogue>
void gated_product(GateLists& lists, const Matrix& gate, const Term (&terms)[Terms], Range rows, int64_t columns,
                   int64_t stride, const Epilogue& epilogue) {
    for (int64_t begin = rows.begin; begin < rows.end; begin += kChunk) {
        const Range chunk{begin, std::min(rows.end, begin + kChunk)};
        if (!lists.list_rows(gate, chunk, terms[0].inner)) {
            product(terms, chunk, columns, stride, epilogue);
            continue;
        }
        const auto line = [=](const Matrix& matrix, int64_t unit) {
            return reinterpret_cast<const char*>(matrix.at(begin, unit));
        };
        gather_panels(lists, terms, {0, panels(columns)}, UnitsOfRow{4 * terms[0].left.stride}, line,
                      [&](Vec x, int64_t row, int64_t panel, int64_t column) {
                          epilogue(x, panel * stride + (begin + row) * kPanel + column, panel * kPanel + column);
                      });
    }
}

// transposed_product() of such terms for one panel of the gate, which is kPanel rows of the result, and some panels of
// it. done(row, panel) follows each tile of kColTile rows.
template <int Terms, typename Epilogue, typename Done>
void gated_transposed_product(GateLists& lists, const Matrix& gate, const Term (&terms)[Terms], Range rows,
                              Range columns, int64_t stride, const Epilogue& epilogue, const Done& done) {
    const Range range{columns.begin / kPanel, panels(columns.end)};
    if (lists.list_columns(gate, rows, terms[0].inner)) {
        const auto line = [=](const Matrix& matrix, int64_t inner) {
            return reinterpret_cast<const char*>(matrix.at(inner, rows.begin));
        };
        gather_panels(lists, terms, range, RowsOfUnit{}, line, [&](Vec x, int64_t row, int64_t panel, int64_t column) {
            epilogue(x, panel * stride + (rows.begin + row) * kPanel + column, panel * kPanel + column);
        });
        for (int64_t panel = range.begin; panel < range.end; ++panel) {
            for (int64_t row = rows.begin; row < rows.end; row += kColTile) done(row, panel);
        }
        return;
    }
    for (int64_t panel = range.begin; panel < range.end; ++panel) {
        transposed_product(terms, rows, panel, columns.end - panel * kPanel, stride, epilogue,
                           [&](int64_t row) { done(row, panel); });
    }
}

}  // namespace sdw::SDW_ISA
