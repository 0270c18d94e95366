// Instructions that CUDA C++ has no name for: tensor-core tiles, asynchronous copies, loads and stores that order
// others.
#pragma once

#include "launch.h"

namespace sdw {

// x rounded to tf32 (10 bits of mantissa), to nearest; infinities and NaN stay. The tensor core itself only cuts off.
__device__ inline float to_tf32(float x) {
#ifdef SDW_EMULATE_CUDA
    const unsigned from = __float_as_uint(x);
    // To add half a unit to a NaN of all ones, as unwritten memory is filled, would make zero of it.
    if ((from & 0x7f800000u) == 0x7f800000u) return (from & 0x007fffffu) == 0 ? x : __uint_as_float(0x7fffffffu);
    return __uint_as_float((from + 0x1000u) & ~0x1fffu);
#else
    unsigned bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return __uint_as_float(bits);
#endif
}

#ifdef SDW_EMULATE_CUDA
// d = c + left right of a warp's lanes, which hold of c and d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <int kDepth, typename Lane>
void multiply_tiles(const Lane* const* lanes, const float (&left)[16][kDepth], const float (&right)[kDepth][8]) {
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
            float sum = lanes[lane]->c[i];
            for (int k = 0; k < kDepth; ++k) sum += left[lane / 4 + i / 2 * 8][k] * right[k][lane % 4 * 2 + i % 2];
            lanes[lane]->d[i] = sum;
        }
    }
}
#endif

// d (16 x 8) += a (16 x 8) b (8 x 8) by the lanes of one warp, operands already rounded to tf32, sums in float32.
// Lane l holds, with g = l / 4 and t = l % 4:
//     a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)     b: (t, g), (t + 4, g)
//     d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
__device__ inline void mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
#ifdef SDW_EMULATE_CUDA
    struct Input {
        const float* a;
        const float* b;
        const float* c;
        float* d;
    };
    emulator::rendezvous<Input, int>(0xffffffffu, Input{a, b, d, d}, [](const Input* const* lanes, int* const*) {
        const auto cut = [](float x) { return __uint_as_float(__float_as_uint(x) & ~0x1fffu); };
        float left[16][8], right[8][8];
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; ++i) left[g + i % 2 * 8][t + i / 2 * 4] = cut(lanes[lane]->a[i]);
            for (int i = 0; i < 2; ++i) right[t + i * 4][g] = cut(lanes[lane]->b[i]);
        }
        multiply_tiles(lanes, left, right);
    });
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#endif
}

// Two floats rounded to half precision, to nearest; the first in the low bits.
__device__ inline unsigned pack_halves(float low, float high) {
#ifdef SDW_EMULATE_CUDA
    return emulator::to_half(low) | emulator::to_half(high) << 16;
#else
    unsigned bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
#endif
}

__device__ inline float2 unpack_halves(unsigned bits) {
#ifdef SDW_EMULATE_CUDA
    return make_float2(emulator::from_half(bits & 0xffffu), emulator::from_half(bits >> 16));
#else
    float2 x;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(x.x), "=f"(x.y)
        : "r"(bits));
    return x;
#endif
}

// d (16 x 8) = c + a (16 x 16) b (16 x 8) by the lanes of one warp: pairs of halves, sums in float32. The order of the
// 16 is any, the same in a and b. With g = lane / 4 and t = lane % 4, and four of them that are this t's:
//     a: row g, the first two; row g + 8, the first two; row g, the other two; row g + 8, the other two
//     b: column g, the first two; the other two      c, d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
__device__ inline void mma_half(float (&d)[4], const unsigned (&a)[4], uint2 b, const float (&c)[4]) {
#ifdef SDW_EMULATE_CUDA
    struct Input {
        const unsigned* a;
        uint2 b;
        const float* c;
        float* d;
    };
    emulator::rendezvous<Input, int>(0xffffffffu, Input{a, b, c, d}, [](const Input* const* lanes, int* const*) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 8; ++i)
                left[g + i / 2 % 2 * 8][4 * t + i / 4 * 2 + i % 2] =
                    emulator::from_half(lanes[lane]->a[i / 2] >> i % 2 * 16 & 0xffffu);
            for (int i = 0; i < 4; ++i)
                right[4 * t + i][g] =
                    emulator::from_half((i < 2 ? lanes[lane]->b.x : lanes[lane]->b.y) >> i % 2 * 16 & 0xffffu);
        }
        multiply_tiles(lanes, left, right);
    });
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, "
        "%12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#endif
}

// Copies 16 bytes from global to shared memory, through the second-level cache only, without waiting. Both addresses
// are multiples of 16 bytes. The copies up to a commit are a group; wait<n> waits for all but the last n groups of this
// thread, and a barrier must follow before other threads read.
__device__ inline void copy_async_16(void* shared, const void* global) {
#ifdef SDW_EMULATE_CUDA
    emulator::copy_async(shared, global, 16);
#else
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
        "l"(global)
        : "memory");
#endif
}

// The same for 4 bytes, through the first-level cache too: for data that nobody writes while the kernel runs.
__device__ inline void copy_async_4(void* shared, const void* global) {
#ifdef SDW_EMULATE_CUDA
    emulator::copy_async(shared, global, 4);
#else
    asm volatile(
        "cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
        "l"(global)
        : "memory");
#endif
}

__device__ inline void copy_async_commit() {
#ifdef SDW_EMULATE_CUDA
    emulator::copy_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int pending>
__device__ inline void copy_async_wait() {
#ifdef SDW_EMULATE_CUDA
    emulator::copy_async_wait(pending);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// Brings a line of 128 bytes to the second-level cache, without waiting.
__device__ inline void prefetch_l2(const void* global) {
#ifdef SDW_EMULATE_CUDA
    static_cast<void>(global);
#else
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
#endif
}

// Adds for the whole device to see; what this thread wrote before (and what it saw, by a barrier, others write) comes
// first.
__device__ inline void add_release(unsigned* address, unsigned value) {
#ifdef SDW_EMULATE_CUDA
    atomicAdd(address, value);
#else
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
#endif
}

// Reads what another block added or stored with release; what that block wrote before is then seen.
__device__ inline unsigned load_acquire(const unsigned* address) {
#ifdef SDW_EMULATE_CUDA
    return *const_cast<const volatile unsigned*>(address);
#else
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
#endif
}

__device__ inline void store_release(unsigned* address, unsigned value) {
#ifdef SDW_EMULATE_CUDA
    atomicExch(address, value);
#else
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
#endif
}

// The blocks of a group of `members` meet; each calls with rounds 1, 2, ... of a counter that starts at zero. All
// threads of a block call; what any of them wrote before is seen by all after.
__device__ inline void meet(unsigned* counter, unsigned members, unsigned round) {
    __syncthreads();
    if (threadIdx.x == 0) {
        add_release(counter, 1u);
        while (load_acquire(counter) < members * round) spin_pause();
    }
    __syncthreads();
}

// The blocks of a cluster meet, all threads of all of them; what any wrote before is seen by all after. Not in code for
// devices before sm_90, where launch_cooperative() takes no clusters.
__device__ inline void meet_cluster() {
#ifdef SDW_EMULATE_CUDA
    emulator::cluster_barrier();
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
#else
    __trap();
#endif
}

// The same without waiting for anybody's stores.
__device__ inline void meet_cluster_unordered() {
#ifdef SDW_EMULATE_CUDA
    emulator::cluster_barrier();
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    asm volatile(
        "barrier.cluster.arrive.relaxed.aligned;\n"
        "barrier.cluster.wait.aligned;" ::
            : "memory");
#else
    __trap();
#endif
}

// A barrier in shared memory whose phase ends when as many bytes have come as expect() has announced for it.
struct Mailbox {
#ifdef SDW_EMULATE_CUDA
    emulator::Mailbox state;

    void open() { state = {}; }
    void expect(int bytes) { state.expect(bytes); }
    void wait(unsigned parity) const {
        while (!state.is_past(parity)) spin_pause();
    }
#else
    unsigned long long state;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    __device__ unsigned address() const { return static_cast<unsigned>(__cvta_generic_to_shared(&state)); }

    // By one thread; a barrier of the cluster must follow.
    __device__ void open() {
        asm volatile(
            "mbarrier.init.shared::cta.b64 [%0], 1;\n"
            "fence.mbarrier_init.release.cluster;" ::"r"(address())
            : "memory");
    }
    // By one thread, once a phase, after the phase before has ended. What has come already counts.
    __device__ void expect(int bytes) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
    }
    // Waits for the end of a phase with this parity: 0 the first one, 1 the next, and so on.
    __device__ void wait(unsigned parity) const {
        unsigned done = 0;
        while (done == 0)
            asm volatile(
                "{\n.reg .pred p;\n"
                "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                "selp.u32 %0, 1, 0, p;\n}"
                : "=r"(done)
                : "r"(address()), "r"(parity)
                : "memory");
    }
#else
    __device__ void open() { __trap(); }
    __device__ void expect(int) { __trap(); }
    __device__ void wait(unsigned) const { __trap(); }
#endif
#endif
};

// The shared memory of a block of the cluster, seen from another: addresses are those of this block's own.
struct Neighbor {
#ifdef SDW_EMULATE_CUDA
    unsigned rank;

    explicit Neighbor(unsigned rank_) : rank(rank_) {}
    Neighbor() = default;
#else
    unsigned distance;  // from this block's addresses to the neighbor's

    Neighbor() = default;
    __device__ explicit Neighbor(unsigned rank) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
        const auto here = static_cast<unsigned>(__cvta_generic_to_shared(shared_memory()));
        unsigned there;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
        distance = there - here;
#else
        distance = rank;
#endif
    }
#endif
    // Stores numbers to `to` over there, whose mailbox counts their bytes when they have come.
    __device__ void mail(float* to, Mailbox* mailbox, float2 x) const {
#ifdef SDW_EMULATE_CUDA
        emulator::mail(to, &mailbox->state, rank, {x.x, x.y});
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
        asm volatile(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%2, %3}, [%1];" ::"r"(there(to)),
            "r"(there(mailbox)), "f"(x.x), "f"(x.y)
            : "memory");
#else
        __trap();
#endif
    }
    // The same; `to` is aligned to 16 bytes.
    __device__ void mail(float* to, Mailbox* mailbox, float4 x) const {
#ifdef SDW_EMULATE_CUDA
        emulator::mail(to, &mailbox->state, rank, {x.x, x.y, x.z, x.w});
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(
                         there(to)),
                     "r"(there(mailbox)), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
                     : "memory");
#else
        __trap();
#endif
    }
#ifndef SDW_EMULATE_CUDA
    __device__ unsigned there(const void* here) const {
        return static_cast<unsigned>(__cvta_generic_to_shared(here)) + distance;
    }
#endif
};

}  // namespace sdw
