// The kernels' threads.
#pragma once

#include <chrono>

namespace sdw {

using Clock = std::chrono::steady_clock;

// Some of the process's workers, taken for one piece of work. A worker is a thread that is started when first needed
// and then kept: idle, it looks for work for some tens of microseconds and then sleeps, as PyTorch's own threads need
// the cores. Calls in several threads, and calls within calls, have workers of their own. A forked child starts new
// ones.
class Workers {
  public:
    // Takes `wanted` workers, or as many as the system has memory and threads for.
    explicit Workers(int wanted);
    // Waits until each has done its work.
    ~Workers();
    Workers(const Workers&) = delete;
    Workers& operator=(const Workers&) = delete;

    int count() const { return count_; }

    // Calls work(argument, i, count() + 1) once in each worker i = 1 … count(). It must not throw.
    void start(void (*work)(void* argument, int member, int size), void* argument);

    // Whether others want the cores now, so that work is better done by the thread that has it.
    static bool crowded();
    // Says how a piece of work by so many threads went, that took `elapsed` and in which they waited `lost`, all
    // together, for threads that had no core. Where they did hardly more than one, the cores are others' for a while.
    static void report(int threads, Clock::duration elapsed, Clock::duration lost);

    struct Worker;

  private:
    Worker* first_ = nullptr;  // of a list
    int count_ = 0;
};

}  // namespace sdw
