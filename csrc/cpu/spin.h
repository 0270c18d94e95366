// What a thread does while it looks for what another one will write.
#pragma once

#include <thread>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace sdw {
namespace {

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
