// The kernels without Python: what they compute from numbers of a fixed generator, in one line each, to be compared
// between compilers and processors. tests/ops/smoke.sh builds and compares.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "sdw/behavior_matching.h"
#include "sdw/flat.h"
#include "sdw/unrolled_bc.h"
#include "sdw/weighted_bc_loss.h"

namespace {

uint64_t state = 1;

std::vector<float> random(int64_t count, float scale) {
    std::vector<float> numbers(count);
    for (float& number : numbers) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        number = scale * (static_cast<float>(state >> 40) / (1 << 23) - 1);
    }
    return numbers;
}

void print(const char* name, const std::vector<float>& numbers) {
    double sum = 0, square = 0;
    for (size_t i = 0; i < numbers.size(); ++i) sum += numbers[i] * (i % 7 + 1.0), square += numbers[i] * numbers[i];
    std::printf("%-24s %.6e %.6e\n", name, sum, square);
}

}  // namespace

int main() {
    for (const int64_t rows : {5, 64, 203}) {
        for (const int64_t width : {7, 64}) {
            const std::vector<int64_t> widths{5, width, width, 3};
            const int64_t flat = sdw::flat_size(widths);
            const auto states = random(rows * 5, 1), targets = random(rows * 3, 0.9f), weights = random(rows, 1);
            const auto params = random(flat, 0.4f);
            std::vector<float> loss(1), gradients(flat), pred_gradient(rows * 3);

            sdw::WeightedBCLossParams w;
            w.rows = rows, w.columns = 3, w.pred = states.data(), w.target = targets.data();
            w.weights = weights.data(), w.loss = loss.data(), w.gradient = pred_gradient.data();
            sdw::weighted_bc_loss_cpu(w);
            print("weighted_bc_loss", loss);
            print("  gradient", pred_gradient);

            sdw::BehaviorMatchingParams b;
            b.problems = 1, b.rows = rows, b.widths = widths, b.params = params.data(), b.states = states.data();
            b.targets = targets.data(), b.weights = weights.data(), b.losses = loss.data();
            b.gradients = gradients.data(), b.threads = 2;
            sdw::behavior_matching_cpu(b);
            print("behavior_matching", loss);
            print("  gradients", gradients);

            const std::vector<float> lr{0.1f};
            std::vector<float> trained(flat), to_states(rows * 5), to_actions(rows * 3), to_params(flat), to_lr(1);
            sdw::UnrolledBCParams u;
            u.problems = 1, u.rows = rows, u.widths = widths, u.steps = u.window = 10, u.momentum = 0.5f;
            u.observations = states.data(), u.actions = targets.data(), u.params = params.data(), u.lr = lr.data();
            u.trained = trained.data(), u.threads = 2, u.keep_tape = true;
            const auto tape = sdw::unrolled_bc_cpu(u);
            sdw::UnrolledBCGradients g;
            g.trained = trained.data(), g.observations = to_states.data(), g.actions = to_actions.data();
            g.params = to_params.data(), g.lr = to_lr.data(), g.threads = 2;
            tape->backward(g);
            print("unrolled_bc", trained);
            print("  observations", to_states);
            print("  actions", to_actions);
            print("  params", to_params);
            print("  lr", to_lr);
        }
    }
}
