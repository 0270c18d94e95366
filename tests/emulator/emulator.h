// CUDA kernels on the CPU, for tests: csrc/cuda/launch.h includes this in place of CUDA when SDW_EMULATE_CUDA is
// defined. Here is what a kernel sees of CUDA; fibers.h has the scheduler.
//
// Every CUDA thread is a fiber with a stack of its own. A fiber runs until it waits (a barrier, a warp's rendezvous, a
// spin), and then the next one is drawn at random from those that can run; the draw is seeded, so that a run can be
// repeated. A missing barrier therefore shows as a wrong result on some seed. Blocks of an ordinary launch run one
// after another in a drawn order, blocks of a cooperative launch are alive all at once. Shared memory starts as NaN,
// and what lies behind it is guarded. Threads that wait for each other for ever end the launch with an error.
//
// Not modeled: memory order (every store is seen at once), caches, alignment of ordinary loads, and time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "fibers.h"

#define SDW_HOST_DEVICE
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace sdw {

// What launch.h offers, see there. The stream is ignored: a launch returns when the grid has run.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void*, Args... args) {
    emulator::run_grid(false, 1, kernel, grid, block, shared_bytes, args...);
}
template <typename... Params, typename... Args>
void launch_cooperative(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void*, Args... args) {
    emulator::run_grid(true, 1, kernel, grid, block, shared_bytes, args...);
}
template <typename... Params, typename... Args>
void launch_clusters(int cluster, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void*,
                     Args... args) {
    emulator::run_grid(true, static_cast<unsigned>(cluster), kernel, grid, block, shared_bytes, args...);
}
inline void use_device(int) {}
inline int multiprocessors() { return emulator::state.multiprocessors; }
inline size_t shared_limit() { return emulator::state.shared_limit; }
template <typename... Params>
int resident_blocks(void (*)(Params...), int, size_t) {
    return emulator::state.multiprocessors;
}
template <typename... Params>
int resident_blocks(int cluster, void (*)(Params...), int, size_t) {
    return emulator::state.multiprocessors / cluster * cluster;
}
inline void set_zero(void* data, size_t bytes, void*) { std::memset(data, 0, bytes); }

inline unsigned char* shared_memory() {
    // The vector's own alignment is 16 bytes (operator new).
    return emulator::state.current->block->shared.data();
}
inline void spin_pause() {
    if (++emulator::state.spins > emulator::kSpins) emulator::fail("emulator: threads spin for ever");
    emulator::step_aside();
}

namespace emulator {

inline float from_half(unsigned bits) {
    const int exponent = static_cast<int>(bits >> 10 & 31u), digits = static_cast<int>(bits & 1023u);
    const float size = exponent == 31 ? (digits == 0 ? INFINITY : NAN)
                                      : std::ldexp(static_cast<float>(exponent == 0 ? digits : digits + 1024),
                                                   std::max(exponent, 1) - 25);
    return bits >> 15 & 1u ? -size : size;
}

// To nearest, ties to even.
inline unsigned to_half(float x) {
    const unsigned sign = std::signbit(x) ? 0x8000u : 0u;
    if (std::isnan(x)) return sign | 0x7e00u;
    if (x == 0) return sign;
    if (std::abs(x) >= 65520.0f) return sign | 0x7c00u;
    int exponent = 0;
    std::frexp(x, &exponent);
    exponent = std::max(exponent, -13);  // of a unit in the last place: exponent - 11
    const float units = std::nearbyint(std::ldexp(std::abs(x), 11 - exponent));
    // 2048 units carry into the exponent by themselves; what has no leading 1 is subnormal.
    return sign | (static_cast<unsigned>(exponent + 13) * 1024u + static_cast<unsigned>(units));
}

}  // namespace emulator

}  // namespace sdw

// CUDA's built-ins.
using std::max;
using std::min;

inline void __syncthreads() { sdw::emulator::barrier(false); }
inline int __syncthreads_count(int vote) { return sdw::emulator::barrier(vote != 0); }
inline int __syncthreads_or(int vote) { return sdw::emulator::barrier(vote != 0) > 0; }
inline int __syncthreads_and(int vote) { return sdw::emulator::barrier(vote == 0) == 0; }
inline void __threadfence() { sdw::emulator::maybe_step_aside(); }
inline void __threadfence_block() { sdw::emulator::maybe_step_aside(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) { sdw::emulator::ballot(mask, false); }
inline unsigned __ballot_sync(unsigned mask, int vote) { return sdw::emulator::ballot(mask, vote != 0); }
inline int __any_sync(unsigned mask, int vote) { return sdw::emulator::ballot(mask, vote != 0) != 0; }
inline int __all_sync(unsigned mask, int vote) { return sdw::emulator::ballot(mask, vote == 0) == 0; }
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    return sdw::emulator::shuffle(mask, value, [=](int lane) { return (lane & -width) + (source & (width - 1)); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    return sdw::emulator::shuffle(mask, value, [=](int lane) {
        const int from = lane ^ lanes;
        return from < (lane & -width) + width ? from : lane;
    });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
    return sdw::emulator::shuffle(mask, value, [=](int lane) {
        const int from = lane + static_cast<int>(lanes);
        return from < (lane & -width) + width ? from : lane;
    });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
    return sdw::emulator::shuffle(mask, value, [=](int lane) {
        const int from = lane - static_cast<int>(lanes);
        return from >= (lane & -width) ? from : lane;
    });
}

template <typename T>
T __ldg(const T* address) {
    return *address;
}
template <typename T>
T __ldcg(const T* address) {
    return *address;
}
template <typename T>
void __stcg(T* address, T value) {
    *address = value;
}

template <typename T, typename Update>
T sdw_emulated_atomic(T* address, Update update) {
    sdw::emulator::maybe_step_aside();
    const T before = *address;
    *address = update(before);
    return before;
}
template <typename T>
T atomicAdd(T* address, T value) {
    return sdw_emulated_atomic(address, [=](T x) { return static_cast<T>(x + value); });
}
template <typename T>
T atomicMax(T* address, T value) {
    return sdw_emulated_atomic(address, [=](T x) { return std::max(x, value); });
}
template <typename T>
T atomicMin(T* address, T value) {
    return sdw_emulated_atomic(address, [=](T x) { return std::min(x, value); });
}
template <typename T>
T atomicOr(T* address, T value) {
    return sdw_emulated_atomic(address, [=](T x) { return x | value; });
}
template <typename T>
T atomicExch(T* address, T value) {
    return sdw_emulated_atomic(address, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, T expected, T value) {
    return sdw_emulated_atomic(address, [=](T x) { return x == expected ? value : x; });
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
template <typename To, typename From>
To sdw_emulated_bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}
inline int __float_as_int(float x) { return sdw_emulated_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return sdw_emulated_bits<unsigned>(x); }
inline float __int_as_float(int x) { return sdw_emulated_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return sdw_emulated_bits<float>(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
