// A team for one kernel call: the thread that calls, and others, PyTorch's or workers of ours; and their barrier.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>

#include "openmp.h"
#include "range.h"
#include "spin.h"
#include "workers.h"

namespace sdw::SDW_ISA {

class Team {
  public:
    int size() const { return size_.load(std::memory_order_relaxed); }

    // The member's contiguous part of [0, count) units of `unit`.
    Range share(int64_t count, int member, int64_t unit = 1) const {
        return {count * member / size() * unit, count * (member + 1) / size() * unit};
    }

    // Returns when all members have come; what they wrote before is then visible to all.
    void wait() {
        if (size() == 1) return;
        const unsigned phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size() - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
        } else {
            // Stages are microseconds long. A wait much longer means that a member has no core: give it ours.
            for (int spins = 0; spins < kSpins; ++spins) {
                if (come(phase)) return;
                spin_pause();
            }
            const Clock::time_point began = Clock::now();
            while (!come(phase)) std::this_thread::yield();
            lost_.fetch_add((Clock::now() - began).count(), std::memory_order_relaxed);
        }
    }

    // Calls body(member, team) on `threads` threads, fewer if the system refuses them; the caller is member 0. Throws
    // what a member throws first, when all have ended: the others leave at the barrier that it never comes to.
    template <typename Body>
    static void run(int threads, Body&& body) {
        if (threads > 1 && Workers::crowded()) threads = 1;
        Team team;
        std::exception_ptr error;
        auto work = [&](int member) {
            try {
                body(member, team);
            } catch (const Abandoned&) {
            } catch (...) {
                if (!team.failed_.exchange(true)) error = std::current_exception();
            }
        };
        if (threads == 1) {
            work(0);
        } else {
            const Clock::time_point began = Clock::now();
            Clock::time_point done;  // when this thread has ended its own part
            auto part = [&](int member, int size) {
                team.size_.store(size, std::memory_order_relaxed);  // all store the same
                work(member);
                if (member == 0) done = Clock::now();
            };
            const auto call = [](void* own, int member, int size) {
                (*static_cast<decltype(part)*>(own))(member, size);
            };
            if (!run_in_openmp(threads, call, &part)) {
                Workers workers(threads - 1);
                workers.start(call, &part);
                part(0, workers.count() + 1);
            }
            const Clock::time_point end = Clock::now();
            Workers::report(team.size(), end - began, Clock::duration(team.lost_.load()) + (end - done));
        }
        if (error) std::rethrow_exception(error);
    }

  private:
    struct Abandoned {};  // thrown in a member that waits for one that has failed

    bool come(unsigned phase) const {
        if (failed_.load(std::memory_order_relaxed)) throw Abandoned{};
        return phase_.load(std::memory_order_acquire) != phase;
    }

    std::atomic<int> size_{1};
    std::atomic<bool> failed_{false};
    std::atomic<Clock::rep> lost_{0};  // in waits for members without a core
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<unsigned> phase_{0};
};

// Threads worth waking (tens of microseconds where they sleep) for so many multiplications altogether.
inline int threads_for(double multiplications, int threads) {
    return static_cast<int>(std::min<double>(threads, 1.0 + multiplications / 2e6));
}

// Calls body(problem, member, threads) once for each of some independent problems, `threads` being what the problem may
// use itself. Problems go side by side, a thread each, as long as there are as many as threads; those left over share
// the threads out. `member` < min(problems, threads) is of no other problem that runs at the time.
template <typename Body>
void side_by_side(int64_t problems, int threads, const Body& body) {
    for (int64_t begin = 0; begin < problems;) {
        const int64_t left = problems - begin, end = left < threads ? problems : problems - left % threads;
        const int together = static_cast<int>(std::min<int64_t>(left, threads));
        std::atomic<int64_t> next{begin};
        Team::run(together, [&](int member, Team&) {
            for (int64_t problem = next++; problem < end; problem = next++) body(problem, member, threads / together);
        });
        begin = end;
    }
}

}  // namespace sdw::SDW_ISA
