// Vectors of floats in the width of the instruction set that this file is compiled for, by the compiler's vector
// extensions: one source for AVX-512, AVX2 and the portable path (SSE2, NEON).
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace sdw::SDW_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes), may_alias));

inline Vec load(const float* aligned) { return *reinterpret_cast<const Vec*>(aligned); }
inline void store(float* aligned, Vec x) { *reinterpret_cast<Vec*>(aligned) = x; }
// Past the caches, which saves reading the line first. Between threads it needs end_streaming() before a release.
inline void stream(float* aligned, Vec x) {
#if defined(__AVX512F__)
    _mm512_stream_ps(aligned, (__m512)x);
#elif defined(__AVX2__)
    _mm256_stream_ps(aligned, (__m256)x);
#elif defined(__SSE__)
    _mm_stream_ps(aligned, (__m128)x);
#else
    store(aligned, x);
#endif
}
inline void end_streaming() {
#if defined(__SSE__)
    _mm_sfence();
#endif
}
inline Vec broadcast(float x) { return x - Vec{}; }
// broadcast(*x) by way of an integer register, for loops that need every load of a vector for something else.
inline Vec broadcast_scalar_load(const float* x) {
    int32_t bits;
    std::memcpy(&bits, x, sizeof bits);
    __asm__("" : "+r"(bits));
    const IntVec lanes = bits - IntVec{};
    return reinterpret_cast<const Vec&>(lanes);
}
// x where the ReLU whose output is h is on, else 0.
inline Vec masked(Vec x, Vec h) { return h > 0.0f ? x : Vec{}; }
// The lanes of x below `count`, and beyond them those of `rest`.
inline Vec first_lanes(Vec x, int64_t count, Vec rest) {
    if (count >= kLanes) return x;
    IntVec numbers;
    for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = lane;
    return numbers < static_cast<int32_t>(count) ? x : rest;
}

// Bit i: lane i is not zero (NaN is not).
inline uint32_t nonzero_lanes(Vec x) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_NEQ_UQ);
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_setzero_ps(), _CMP_NEQ_UQ)));
#elif defined(__SSE__)
    return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpneq_ps((__m128)x, _mm_setzero_ps())));
#else
    uint32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<uint32_t>(x[lane] != 0.0f) << lane;
    return bits;
#endif
}

// Writes scale * (first + i) for every bit i < kLanes that is on, in order, and up to kLanes numbers in all.
inline void append_lanes(uint16_t* out, uint32_t bits, int first, int scale) {
#if defined(__AVX512F__)
    typedef uint16_t Line __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
    const IntVec lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const IntVec numbers = (lanes + first) * scale;
    const auto chosen = (IntVec)_mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), (__m512i)numbers);
    *reinterpret_cast<Line*>(out) = __builtin_convertvector(chosen, Line);
#else
    for (; bits != 0; bits &= bits - 1) *out++ = static_cast<uint16_t>(scale * (first + __builtin_ctz(bits)));
#endif
}

// Lane i is lane order[i] of a, then of b. Clang folds the loop where the order is a constant.
template <typename Lanes, typename Order>
inline Lanes shuffled(Lanes a, Lanes b, Order order) {
#if defined(__clang__)
    constexpr int kCount = sizeof(Lanes) / sizeof(a[0]);
    Lanes result;
    for (int i = 0; i < kCount; ++i) result[i] = order[i] < kCount ? a[order[i]] : b[order[i] - kCount];
    return result;
#else
    return __builtin_shuffle(a, b, order);
#endif
}

// Lane i is lane order[i] of x.
inline Vec permuted(Vec x, IntVec order) {
#if !defined(__clang__)
    return __builtin_shuffle(x, order);
#elif defined(__AVX512F__)
    return _mm512_permutexvar_ps((__m512i)order, x);
#elif defined(__AVX2__)
    return _mm256_permutevar8x32_ps(x, (__m256i)order);
#else
    return shuffled(x, x, order);
#endif
}

// Products of tiny numbers underflow to zero instead of to denormals, which cost a hundred cycles each on x86.
class FlushDenormals {
  public:
#if defined(__SSE__)
    FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(saved_); }
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;

  private:
    unsigned saved_;
#else
    FlushDenormals() {}
#endif
};

// e^x for x in [-87, 20], within 1 ulp: x = n ln 2 + r, a polynomial in r (Cephes, expf), 2^n put into the exponent.
inline Vec exp(Vec x) {
    const Vec shift = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vec n = (x * 1.44269504f + shift) - shift;
    const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const IntVec power = (__builtin_convertvector(n, IntVec) + 127) << 23;
    return p * reinterpret_cast<const Vec&>(power);
}

// tanh within 2 ulp: an odd polynomial (Cephes, tanhf) near zero, where 1 - 2/(e^2x + 1) would cancel. NaN stays NaN.
inline Vec tanh(Vec x) {
    const Vec magnitude = x < 0.0f ? -x : x;
    const Vec bounded = magnitude < 9.0f ? magnitude : broadcast(9.0f);  // tanh(9) rounds to 1
    const Vec far = 1.0f - 2.0f / (exp(2.0f * bounded) + 1.0f);
    const Vec z = x * x;
    Vec p = broadcast(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    const Vec near = x + x * z * p;
    const Vec result = magnitude < 0.625f ? near : (x < 0.0f ? -far : far);
    return x == x ? result : x;
}

}  // namespace sdw::SDW_ISA
