// The last layer (sdw/head.h), the only place where one head differs from another.
//
//                error e      slope      loss        moved              curvature
//     tanh       a - y        1 - a²     e²          (1 - a²) R z       1 - a² - 2 e a
//     identity   a - y        1          e²          R z                1
//     softmax    σ p - y      1          -y log p    R z - <p, R z>     σ p                 σ = Σ_j y_j
//
// With c the loss's factor and R the derivative along v, an element each: delta = c e slope, R delta = c curvature
// moved, d<g, v>/dy = -c moved and <g, v> = c Σ e moved. Where a row's elements share a number, the head is made of the
// row.
#pragma once

#include <cmath>
#include <limits>

#include "product.h"
#include "sdw/head.h"

namespace sdw::SDW_ISA {

// A row of the output's matrices.
struct OutputRow {
    int64_t row, columns, stride;

    // Calls body(offset, columns from there on) for every vector of the row.
    template <typename Body>
    void for_each(const Body& body) const {
        for (int64_t column = 0; column < columns; column += kLanes)
            body(column / kPanel * stride + row * kPanel + column % kPanel, columns - column);
    }
    // Σ of value(offset, columns from there on) over the row.
    template <typename Value>
    float sum(const Value& value) const {
        Vec sums{};
        for_each([&](int64_t offset, int64_t left) { sums += value(offset, left); });
        float total = 0.0f;
        for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
        return total;
    }
};

class IdentityHead {
  public:
    // For output, error, delta and loss; z, a = the output, y and tangent = R z lie where the row says.
    static IdentityHead of_outputs(const OutputRow&, const float* /*z*/, const float* /*y*/) { return {}; }
    // For error, moved and curvature.
    static IdentityHead of_tangents(const OutputRow&, const float* /*a*/, const float* /*y*/,
                                    const float* /*tangent*/) {
        return {};
    }
    static Vec output(Vec z, int64_t /*columns from there on*/) { return z; }
    static Vec error(Vec a, Vec y) { return a - y; }
    static Vec delta(Vec scaled_error, Vec /*a*/) { return scaled_error; }
    static Vec loss(Vec /*z*/, Vec /*y*/, Vec error) { return error * error; }
    static Vec moved(Vec /*a*/, Vec tangent) { return tangent; }
    static Vec curvature(Vec /*a*/, Vec /*error*/) { return broadcast(1.0f); }
};

class TanhHead {
  public:
    static TanhHead of_outputs(const OutputRow&, const float*, const float*) { return {}; }
    static TanhHead of_tangents(const OutputRow&, const float*, const float*, const float*) { return {}; }
    static Vec output(Vec z, int64_t) { return tanh(z); }
    static Vec error(Vec a, Vec y) { return a - y; }
    static Vec delta(Vec scaled_error, Vec a) { return scaled_error * (1.0f - a * a); }
    static Vec loss(Vec, Vec, Vec error) { return error * error; }
    static Vec moved(Vec a, Vec tangent) { return (1.0f - a * a) * tangent; }
    static Vec curvature(Vec a, Vec error) { return (1.0f - a * a) - 2.0f * error * a; }
};

class SoftmaxHead {
  public:
    static SoftmaxHead of_outputs(const OutputRow& row, const float* z, const float* y) {
        SoftmaxHead head = of_targets(row, y);
        Vec largest = broadcast(-std::numeric_limits<float>::infinity());
        row.for_each([&](int64_t offset, int64_t left) {
            const Vec x = first_lanes(load(z + offset), left, largest);
            largest = x > largest ? x : largest;
        });
        head.largest_ = largest[0];
        for (int lane = 1; lane < kLanes; ++lane) head.largest_ = std::max(head.largest_, largest[lane]);
        head.sum_ = row.sum(
            [&](int64_t offset, int64_t left) { return first_lanes(head.relative(load(z + offset)), left, Vec{}); });
        return head;
    }
    static SoftmaxHead of_tangents(const OutputRow& row, const float* a, const float* y, const float* tangent) {
        SoftmaxHead head = of_targets(row, y);
        head.mean_ = row.sum([&](int64_t offset, int64_t) { return load(a + offset) * load(tangent + offset); });
        return head;
    }
    Vec output(Vec z, int64_t left) const { return first_lanes(relative(z) / sum_, left, Vec{}); }
    Vec error(Vec p, Vec y) const { return mass_ * p - y; }
    static Vec delta(Vec scaled_error, Vec) { return scaled_error; }
    Vec loss(Vec z, Vec y, Vec) const { return y * (std::log(sum_) - (z - largest_)); }
    Vec moved(Vec, Vec tangent) const { return tangent - mean_; }
    Vec curvature(Vec p, Vec) const { return mass_ * p; }

  private:
    static SoftmaxHead of_targets(const OutputRow& row, const float* y) {
        SoftmaxHead head;
        head.mass_ = row.sum([&](int64_t offset, int64_t) { return load(y + offset); });
        return head;
    }
    // e^(z - max z): at most 1, so that no sum overflows. NaN stays NaN.
    Vec relative(Vec z) const {
        const Vec x = z - largest_;
        return exp(x < -87.0f ? broadcast(-87.0f) : x);
    }

    float mass_ = 0.0f;                  // σ
    float largest_ = 0.0f, sum_ = 0.0f;  // max z, Σ e^(z - max z)
    float mean_ = 0.0f;                  // <p, R z>
};

// body(any value of the head's class)
template <typename Body>
void with_head(Head head, const Body& body) {
    switch (head) {
        case Head::tanh:
            return body(TanhHead{});
        case Head::identity:
            return body(IdentityHead{});
        case Head::softmax:
            return body(SoftmaxHead{});
    }
}

}  // namespace sdw::SDW_ISA
