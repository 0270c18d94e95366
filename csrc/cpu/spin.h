// What a thread does while it looks for what another one will write.
#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace sdw {
namespace {

// Pauses before a thread that waits gives its core away: some tens of microseconds altogether.
constexpr int kSpins = 2000;

// Tells the processor that this is a wait: some tens of nanoseconds.
inline void spin_pause() {
#if defined(__SSE__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

}  // namespace
}  // namespace sdw
