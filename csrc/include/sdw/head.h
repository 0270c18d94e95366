// The last layer of a policy: what it makes of its pre-activations z, and the loss of a row with targets y, A outputs.
#pragma once

#include <cstdint>

namespace sdw {

enum class Head {
    tanh,      // a = tanh(z), sum_j (a_j - y_j)^2 / A
    identity,  // a = z, sum_j (a_j - y_j)^2 / A
    softmax,   // p = softmax(z), -sum_j y_j log p_j; the targets of a row may add up to any number
};

// A row's loss is a sum over its outputs divided by this.
constexpr int64_t loss_divisor(Head head, int64_t outputs) { return head == Head::softmax ? 1 : outputs; }

// The derivative of that sum for an output, or for z of a softmax, is this times the error.
constexpr float loss_slope(Head head) { return head == Head::softmax ? 1.0f : 2.0f; }

}  // namespace sdw
