// A team of threads for the length of one kernel call.
//
// Threads are started for the call and end with it: 20 microseconds a thread, against calls of milliseconds. In return
// there is no second pool whose idle workers spin on the cores that PyTorch's own pool needs next, calls from several
// Python threads are independent, and fork() is safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "range.h"

namespace sdw::SDW_ISA {

inline void spin_pause(int& spins) {
    // Stages are microseconds long. A wait much longer means that the partner has lost its core: give ours away.
    if (++spins > 4000) {
        std::this_thread::yield();
        return;
    }
#if defined(__SSE__)
    _mm_pause();
#endif
}

class Team {
  public:
    int size() const { return size_; }

    // The member's contiguous part of [0, count) units of `unit`.
    Range share(int64_t count, int member, int64_t unit = 1) const {
        return {count * member / size_ * unit, count * (member + 1) / size_ * unit};
    }

    // Returns when all members have come; what they wrote before is then visible to all.
    void wait() {
        if (size_ == 1) return;
        const unsigned phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
        } else {
            int spins = 0;
            while (phase_.load(std::memory_order_acquire) == phase) {
                if (failed_.load(std::memory_order_relaxed)) throw Abandoned{};
                spin_pause(spins);
            }
        }
    }

    // Calls body(member, team) on `threads` threads, fewer if the system refuses them; the caller is member 0. Throws
    // what a member throws first, when all have ended: the others leave at the barrier that it never comes to.
    template <typename Body>
    static void run(int threads, Body&& body) {
        Team team;
        std::exception_ptr error;
        const auto work = [&](int member) {
            try {
                body(member, team);
            } catch (const Abandoned&) {
            } catch (...) {
                if (!team.failed_.exchange(true)) error = std::current_exception();
            }
        };
        std::atomic<int> size{0};
        std::vector<std::thread> others;
        others.reserve(threads);
        try {
            for (int member = 1; member < threads; ++member) {
                others.emplace_back([&, member] {
                    int spins = 0;
                    while (size.load(std::memory_order_acquire) == 0) spin_pause(spins);
                    work(member);
                });
            }
        } catch (const std::exception&) {  // no thread, or no memory for one
        }
        team.size_ = static_cast<int>(others.size()) + 1;
        size.store(team.size_, std::memory_order_release);
        work(0);
        for (std::thread& other : others) other.join();
        if (error) std::rethrow_exception(error);
    }

  private:
    struct Abandoned {};  // thrown in a member that waits for one that has failed

    int size_ = 1;
    std::atomic<bool> failed_{false};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<unsigned> phase_{0};
};

}  // namespace sdw::SDW_ISA
