#include "workers.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "spin.h"

namespace sdw {
namespace {

// Yes or no, to be waited for.
class Flag {
  public:
    void set(bool value) {
        value_.store(value);
        if (sleepers_.load() == 0) return;
        const std::lock_guard<std::mutex> lock(mutex_);
        changed_.notify_all();
    }

    void wait_for(bool value) {
        for (int spins = 0; spins < kSpins; ++spins) {
            if (value_.load(std::memory_order_acquire) == value) return;
            spin_pause();
        }
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleepers_;
        changed_.wait(lock, [&] { return value_.load() == value; });
        --sleepers_;
    }

  private:
    std::atomic<bool> value_{false};
    std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable changed_;
};

}  // namespace

struct alignas(64) Workers::Worker {
    Flag busy;
    void (*work)(void*, int, int);
    void* argument;
    int number, size;
    Worker* next;  // of the idle ones, or of those taken together

    void run() {
        while (true) {
            busy.wait_for(true);
            work(argument, number, size);
            busy.set(false);
        }
    }

    // Null where the system refuses memory or a thread. A worker is never freed: its thread ends with the process.
    static Worker* make() {
        auto* worker = new (std::nothrow) Worker;
        if (worker == nullptr) return nullptr;
        try {
            std::thread([worker] { worker->run(); }).detach();
        } catch (const std::exception&) {
            delete worker;
            return nullptr;
        }
        return worker;
    }
};

namespace {

std::mutex idle_mutex;
Workers::Worker* idle = nullptr;
std::atomic<Clock::rep> crowded_until{0};
#if !defined(_WIN32)
// A forked child has only the thread that forked, and no worker. A fork waits until no thread is at the list.
[[maybe_unused]] const int fork_waits = pthread_atfork([] { idle_mutex.lock(); }, [] { idle_mutex.unlock(); },
                                                       [] {
                                                           idle = nullptr;
                                                           crowded_until = 0;
                                                           idle_mutex.unlock();
                                                       });
#endif

Workers::Worker* take_idle() {
    const std::lock_guard<std::mutex> lock(idle_mutex);
    Workers::Worker* worker = idle;
    if (worker != nullptr) idle = worker->next;
    return worker;
}

}  // namespace

Workers::Workers(int wanted) {
    while (count_ < wanted) {
        Worker* worker = take_idle();
        if (worker == nullptr) worker = Worker::make();
        if (worker == nullptr) return;
        worker->number = ++count_;
        worker->next = first_;
        first_ = worker;
    }
}

void Workers::start(void (*work)(void*, int, int), void* argument) {
    for (Worker* worker = first_; worker != nullptr; worker = worker->next) {
        worker->work = work;
        worker->argument = argument;
        worker->size = count_ + 1;
        worker->busy.set(true);
    }
}

bool Workers::crowded() {
    return Clock::now().time_since_epoch().count() < crowded_until.load(std::memory_order_relaxed);
}

void Workers::report(int threads, Clock::duration elapsed, Clock::duration lost) {
    if (threads == 1 || 4 * (threads * elapsed - lost) >= 5 * elapsed) return;
    const Clock::duration pause = std::min<Clock::duration>(16 * elapsed, std::chrono::seconds(10));
    crowded_until.store((Clock::now() + pause).time_since_epoch().count(), std::memory_order_relaxed);
}

Workers::~Workers() {
    while (first_ != nullptr) {
        Worker* worker = first_;
        first_ = worker->next;
        worker->busy.wait_for(false);
        const std::lock_guard<std::mutex> lock(idle_mutex);
        worker->next = idle;
        idle = worker;
    }
}

}  // namespace sdw
