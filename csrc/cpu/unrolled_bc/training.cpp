// Behavior cloning unrolled: the forward pass, which leaves the tape.
#include <cstdio>
#include <mutex>
#include <string>

#include "sdw/flat.h"
#include "sdw/memory.h"
#include "unroll.h"

namespace sdw::SDW_ISA {
namespace unrolled {

void Unroll::copy_weights(const Weights& from, const Weights& to, int member, Team& team) const {
    for (int l = 0; l < mlp_.layers; ++l) {
        const int64_t floats = panels(mlp_.widths[l + 1]) * from.matrices[l].stride;
        const Range range = team.share(floats / kPanel, member, kPanel);
        std::copy(from.matrices[l].data + range.begin, from.matrices[l].data + range.end,
                  to.matrices[l].data + range.begin);
        if (member == 0) std::copy_n(from.biases[l], panels(mlp_.widths[l + 1]) * kPanel, to.biases[l]);
    }
    team.wait();
}

void Unroll::transpose_weights(const Weights& theta, const Strips& strips, Team& team) const {
    for (const Strip& strip : strips) {
        for (int64_t panel = strip.columns.begin / kPanel; panel < panels(strip.columns.end); ++panel) {
            for (int64_t row = strip.rows.begin; row < strip.rows.end; row += kColTile)
                transpose_tile(theta.matrices[strip.layer], at_.transposed[strip.layer], row, panel);
        }
    }
    team.wait();
}

// From the pre-activations in h[L]: the output in their place, and delta[L].
void Unroll::output_delta(const Pass& pass, Range range) const {
    float* output = pass.h[mlp_.layers].data;
    float* delta = pass.delta[mlp_.layers].data;
    const float* actions = at_.actions.data;
    with_head(head_, [&](auto kind) {
        mlp_.for_each_output(range, [&](const OutputRow& row) {
            const auto head = kind.of_outputs(row, output, actions);
            row.for_each([&](int64_t offset, int64_t left) {
                const Vec a = head.output(load(output + offset), left);
                store(output + offset, a);
                store(delta + offset, head.delta(scale_ * head.error(a, load(actions + offset)), a));
            });
        });
    });
}

// theta_{t+1} = theta_t - (mu u_t + alpha g), and u.
Vec Unroll::descended(Vec gradient, const float* theta, float* velocity) const {
    if (momentum_ == 0.0f) return load(theta) - lr_ * gradient;
    const Vec moved = momentum_ * load(velocity) + lr_ * gradient;
    store(velocity, moved);
    return load(theta) - moved;
}

// One SGD step: the pass at step.theta, and `next` = theta_{t+1} with its transpose. `next` may be step.theta.
void Unroll::descend(const Step& step, const Weights& next, const Strips& strips, GateLists& lists, int member,
                     Team& team) const {
    const Range range = team.share(mlp_.tiles, member, kRowTile);
    mlp_.forward(lists, step.theta, step.pass, range);
    output_delta(step.pass, range);
    mlp_.backward(lists, at_.transposed, step.pass, range);
    team.wait();
    for (const Strip& strip : strips) {
        const int l = strip.layer;
        const Matrix &from = step.theta.matrices[l], &to = next.matrices[l], &delta = step.pass.delta[l + 1];
        float* velocity = at_.velocity.matrices[l].data;
        const Term terms[] = {{step.pass.h[l], delta, mlp_.rows}};
        mlp_.multiply_columns(
            lists, step.pass, strip, terms, to.stride,
            [&](Vec x, int64_t offset, int64_t) {
                store(to.data + offset, descended(x, from.data + offset, velocity + offset));
            },
            [&](int64_t row, int64_t panel) { transpose_tile(to, at_.transposed[l], row, panel); });
        if (strip.rows.begin == 0) {
            mlp_.for_each_bias(delta, strip, [&](Vec x, int64_t column) {
                store(next.biases[l] + column,
                      descended(x, step.theta.biases[l] + column, at_.velocity.biases[l] + column));
            });
        }
    }
    team.wait();
}

void Unroll::run_segment(int64_t segment, const Strips& strips, GateLists& lists, int member, Team& team) const {
    for (int64_t i = 0; i < plan_.steps(segment); ++i)
        descend(at_.steps[i], at_.steps[i + 1].theta, strips, lists, member, team);
}

void Unroll::train(const UnrolledBCParams& params, int most_threads) {
    std::fill_n(block_, at_.steps[0].pass.h[1].data - block_, 0.0f);  // padding, and the velocity
    const int64_t inputs = mlp_.widths.front(), outputs = mlp_.widths.back(), flat = flat_size(mlp_.widths);
    pack(params.observations + problem_ * mlp_.rows * inputs, inputs, {0, mlp_.rows}, at_.observations);
    pack(params.actions + problem_ * mlp_.rows * outputs, outputs, {0, mlp_.rows}, at_.actions);
    pack_weights(mlp_, params.params + problem_ * flat, at_.steps[0].theta, at_.transposed);

    const int threads = mlp_.useful_threads(most_threads);
    std::vector<GateLists> gate_lists = mlp_.gate_lists(threads);
    Team::run(threads, [&](int member, Team& team) {
        const FlushDenormals flush;
        GateLists& lists = gate_lists[member];
        const Strips strips = mlp_.strips(team.size())[member];
        const Step& first = at_.steps[0];
        // Steps that leave no tape overwrite their own parameters.
        for (int64_t step = 0; step < params.steps - plan_.window; ++step)
            descend(first, first.theta, strips, lists, member, team);
        for (int64_t segment = 0; segment < plan_.segments; ++segment) {
            if (segment > 0) copy_weights(at_.steps[plan_.length].theta, first.theta, member, team);
            if (plan_.segments > 1) {
                copy_weights(first.theta, at_.starts[segment].theta, member, team);
                copy_weights(at_.velocity, at_.starts[segment].velocity, member, team);
            }
            run_segment(segment, strips, lists, member, team);
        }
    });
    held_ = plan_.segments - 1;
    unpack_weights(mlp_, at_.steps[plan_.steps(held_)].theta, at_.transposed, params.trained + problem_ * flat);
}

}  // namespace unrolled

namespace {

using namespace unrolled;

std::string gibibytes(double bytes) {
    char text[32];
    std::snprintf(text, sizeof text, "%.2f GiB", bytes / (1 << 30));
    return text;
}

// The bytes of a layout and of its entries, from those of its smallest likes: the entries of very many steps would
// exhaust the memory before they are counted. In floating point, as they may be more than an integer holds.
double predicted_bytes(const Mlp& mlp, const Plan& plan) {
    const auto with = [&](int64_t length, int64_t segments) {
        Plan small = plan;
        small.length = length;
        small.segments = segments;
        return static_cast<double>(Layout(mlp, small, nullptr).bytes);
    };
    const double base = with(1, 1), step = with(2, 1) - base, start = (with(1, 2) - base) / 2;
    const double entry = sizeof(Step) + sizeof(Start) + 8.0 * static_cast<double>(mlp.layers + 1) * sizeof(Matrix);
    return base + (step + entry) * static_cast<double>(plan.length) +
           (plan.segments > 1 ? (start + entry) * static_cast<double>(plan.segments) : 0.0);
}

// Threads worth their waking for all problems together.
int useful_threads(const UnrolledBCParams& params, int threads) {
    const double passes = static_cast<double>(params.problems) * static_cast<double>(params.steps);
    return threads_for(passes * static_cast<double>(Mlp(params.widths, params.rows).multiplications()), threads);
}

// Problems with memory of their own: all whose tapes are kept, else those that are trained at one time.
int64_t places(const UnrolledBCParams& params) {
    if (params.keep_tape) return params.problems;
    return std::min<int64_t>(params.problems, useful_threads(params, params.threads));
}

// The bytes of one problem's tape; throws if the machine does not have them for all that are held at a time.
size_t checked_bytes(const UnrolledBCParams& params) {
    const Mlp mlp(params.widths, params.rows);
    const Plan plan(params, params.recompute);
    const auto tapes = static_cast<double>(places(params));
    const double needed = tapes * predicted_bytes(mlp, plan), available = static_cast<double>(available_memory());
    if (needed <= available) return Layout(mlp, plan, nullptr).bytes;
    std::string message = "unrolled_bc: the tape of " + std::to_string(plan.window) + " steps with " +
                          std::to_string(params.rows) + " rows" +
                          (tapes > 1 ? " for " + std::to_string(places(params)) + " problems" : "") + " needs " +
                          gibibytes(needed) + " and " + gibibytes(available) + " are available; ";
    if (plan.keep && !params.recompute)
        message += "tape=\"recompute\" needs " + gibibytes(tapes * predicted_bytes(mlp, Plan(params, true))) + ", and ";
    throw OutOfMemory(message + "a smaller window or fewer rows need less (ops.unrolled_bc_memory says how much)");
}

// All problems, in one block, so that a block kept (sdw/memory.h) serves the next call whatever their number.
class Tape final : public UnrolledBCTape {
  public:
    explicit Tape(const UnrolledBCParams& params)
        : params_(params), bytes_(checked_bytes(params)), buffer_(places(params) * bytes_) {}

    void train() {
        problems_.resize(params_.problems);
        side_by_side(
            params_.problems, useful_threads(params_, params_.threads), [&](int64_t r, int member, int threads) {
                const int64_t place = params_.keep_tape ? r : member;
                auto problem = std::make_unique<Unroll>(params_, r, buffer_.data() + place * (bytes_ / sizeof(float)));
                problem->train(params_, threads);
                if (params_.keep_tape) problems_[r] = std::move(problem);
            });
    }

    void backward(const UnrolledBCGradients& gradients) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        side_by_side(params_.problems, useful_threads(params_, gradients.threads),
                     [&](int64_t r, int, int threads) { problems_[r]->backward(gradients, threads); });
    }

  private:
    const UnrolledBCParams params_;
    const size_t bytes_;  // of one problem
    const Buffer buffer_;
    std::vector<std::unique_ptr<Unroll>> problems_;
    std::mutex mutex_;  // a backward pass works inside the tape's block
};

}  // namespace

size_t unrolled_bc_cpu_memory(const UnrolledBCParams& params) {
    return static_cast<size_t>(static_cast<double>(places(params)) *
                               predicted_bytes(Mlp(params.widths, params.rows), Plan(params, params.recompute)));
}

std::unique_ptr<UnrolledBCTape> unrolled_bc_cpu(const UnrolledBCParams& params) {
    auto tape = std::make_unique<Tape>(params);
    tape->train();
    if (!params.keep_tape) return nullptr;
    return tape;
}

}  // namespace sdw::SDW_ISA
