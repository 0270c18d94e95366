// The outer loss and its gradient for the parameters, in one pass over blocks of rows that stay in cache: no temporary
// grows with M, and a state is read once.
#include "sdw/behavior_matching.h"

#include "mlp.h"
#include "sdw/flat.h"
#include "sdw/memory.h"

namespace sdw::SDW_ISA {
namespace {

// Rows of a block: the activations of a 256-wide layer then fit a second-level cache beside its weights, and the
// gradient, read and written once a block, is little traffic beside the block's own.
constexpr int64_t kBlockRows = 256;

// Rows for which another thread pays: one thread packs the weights, which takes as long as many rows do.
constexpr int64_t kRowsOfThread = 128;

struct Layout {
    Matrix targets;
    Weights params, gradient;
    std::vector<Matrix> transposed;
    Pass pass;
    float* row_weights;
    size_t bytes;

    Layout(const Mlp& mlp, float* block) {
        Arena arena(block);
        const Matrix states = mlp.take_rows(arena, mlp.widths.front());
        targets = mlp.take_rows(arena, mlp.widths.back());
        params = mlp.take_weights(arena);
        gradient = mlp.take_weights(arena);
        transposed = mlp.take_transposed(arena);
        row_weights = arena.take(mlp.tiles * kRowTile);
        pass = mlp.take_pass(arena, states);
        bytes = arena.bytes();
    }
};

// Rows [first + range.begin, first + range.end) of the data. Those beyond the last get weight zero.
void load_rows(const BehaviorMatchingParams& p, const Layout& at, int64_t first, Range range) {
    const int64_t inputs = p.widths.front(), outputs = p.widths.back();
    const Range filled{range.begin, std::max(range.begin, std::min(range.end, p.rows - first))};
    pack(p.states + first * inputs, inputs, filled, at.pass.h[0]);
    pack(p.targets + first * outputs, outputs, filled, at.targets);
    for (int64_t row = range.begin; row < range.end; ++row) {
        at.row_weights[row] = row < filled.end ? p.weights[first + row] : 0.0f;
        if (row < filled.end) continue;
        for (int64_t column = 0; column < inputs; ++column) *at.pass.h[0].at(row, column) = 0.0f;
    }
}

// From the pre-activations in h[L]: delta[L], and the rows' losses added to `losses`; a loss is `scale` times their
// sum.
void output_delta(const Mlp& mlp, const Layout& at, Head kind, float scale, Range range, double* losses) {
    const float *outputs = at.pass.h[mlp.layers].data, *targets = at.targets.data;
    float* delta = at.pass.delta[mlp.layers].data;
    with_head(kind, [&](auto any) {
        mlp.for_each_output(range, [&](const OutputRow& row) {
            const float weight = at.row_weights[row.row];
            const auto head = any.of_outputs(row, outputs, targets);
            row.for_each([&](int64_t offset, int64_t left) {
                const Vec z = load(outputs + offset), y = load(targets + offset), a = head.output(z, left);
                const Vec error = weight == 0.0f ? Vec{} : head.error(a, y);
                const Vec loss = weight == 0.0f ? Vec{} : head.loss(z, y, error);
                store(delta + offset, head.delta(loss_slope(kind) * scale * weight * error, a));
                for (int lane = 0; lane < kLanes; ++lane) losses[row.row] += static_cast<double>(weight) * loss[lane];
            });
        });
    });
}

// A block's gradients, added to those of the blocks before it, if any: what lies there before the first is not read.
void add_gradients(const Mlp& mlp, const Layout& at, const std::vector<Strip>& strips, GateLists& lists, bool first) {
    const auto add = [first](float* to, Vec x) { store(to, first ? x : load(to) + x); };
    for (const Strip& strip : strips) {
        const int l = strip.layer;
        const Matrix &gradient = at.gradient.matrices[l], &delta = at.pass.delta[l + 1];
        mlp.multiply_columns(
            lists, at.pass, strip, {Term{at.pass.h[l], delta, mlp.rows}}, gradient.stride,
            [&](Vec x, int64_t offset, int64_t) { add(gradient.data + offset, x); }, [](int64_t, int64_t) {});
        if (strip.rows.begin == 0) {
            mlp.for_each_bias(delta, strip, [&](Vec x, int64_t column) { add(at.gradient.biases[l] + column, x); });
        }
    }
}

// The network for blocks of rows that are about equal.
Mlp mlp_for(const BehaviorMatchingParams& p) {
    const int64_t blocks = (p.rows + kBlockRows - 1) / kBlockRows;
    return {p.widths, (p.rows + blocks - 1) / blocks};
}

// The first problem's loss, and its gradients; `block` is of the layout's size.
float loss_of(const BehaviorMatchingParams& p, float* block, int most_threads) {
    const Mlp mlp = mlp_for(p);
    const Layout at(mlp, block);
    const bool want_gradients = p.gradients != nullptr;
    const float scale = 1.0f / (static_cast<float>(p.rows) * static_cast<float>(loss_divisor(p.head, p.widths.back())));
    zero_padding(at.pass.h[0], mlp.tiles * kRowTile, p.widths.front());
    zero_padding(at.targets, mlp.tiles * kRowTile, p.widths.back());
    zero_padding(mlp, at.params, at.transposed);
    pack_weights(mlp, p.params, at.params, at.transposed);

    std::vector<double> losses(mlp.tiles * kRowTile);
    const int64_t most_for_rows = 1 + p.rows / kRowsOfThread;
    const int threads = static_cast<int>(std::min<int64_t>(mlp.useful_threads(most_threads), most_for_rows));
    std::vector<GateLists> gate_lists = mlp.gate_lists(threads);
    Team::run(threads, [&](int member, Team& team) {
        const FlushDenormals flush;
        GateLists& lists = gate_lists[member];
        const std::vector<Strip> strips = mlp.strips(team.size())[member];
        const Range range = team.share(mlp.tiles, member, kRowTile);
        for (int64_t first = 0; first < p.rows; first += mlp.rows) {
            load_rows(p, at, first, range);
            mlp.forward(lists, at.params, at.pass, range);
            output_delta(mlp, at, p.head, scale, range, losses.data());
            if (!want_gradients) continue;
            mlp.backward(lists, at.transposed, at.pass, range);
            team.wait();
            add_gradients(mlp, at, strips, lists, first == 0);
            team.wait();
        }
    });

    if (want_gradients) {
        for (int l = 0; l < mlp.layers; ++l)
            transpose(at.gradient.matrices[l], mlp.widths[l], mlp.widths[l + 1], at.transposed[l]);
        unpack_weights(mlp, at.gradient, at.transposed, p.gradients);
    }
    double loss = 0.0;
    for (int64_t row = 0; row < mlp.rows; ++row) loss += losses[row];
    return static_cast<float>(loss * scale);
}

}  // namespace

void behavior_matching_cpu(const BehaviorMatchingParams& params) {
    const int64_t inputs = params.widths.front(), outputs = params.widths.back(), flat = flat_size(params.widths);
    const Mlp mlp = mlp_for(params);
    const size_t bytes = Layout(mlp, nullptr).bytes;
    const double passes =
        static_cast<double>(params.problems) * static_cast<double>(params.rows) / static_cast<double>(mlp.rows);
    const int threads = threads_for(passes * static_cast<double>(mlp.multiplications()), params.threads);
    const Buffer buffer(std::min<int64_t>(params.problems, threads) * bytes);
    side_by_side(params.problems, threads, [&](int64_t r, int member, int threads_of_problem) {
        BehaviorMatchingParams p = params;
        p.params += r * flat;
        p.states += r * p.rows * inputs;
        p.targets += r * p.rows * outputs;
        p.weights += r * p.rows;
        if (p.gradients != nullptr) p.gradients += r * flat;
        params.losses[r] = loss_of(p, buffer.data() + member * (bytes / sizeof(float)), threads_of_problem);
    });
}

}  // namespace sdw::SDW_ISA
