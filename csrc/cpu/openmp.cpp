#include "openmp.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <vector>
#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "sdw/isa.h"
#include "sdw/openmp.h"

namespace sdw {
namespace {

OpenMP openmp;
std::atomic<bool> is_shared{false}, is_forked{false};
#if !defined(_WIN32)
[[maybe_unused]] const int forks_are_noted = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });
#endif

// Whether the system gives this thread as many others: tried once, before the runtime starts its own.
bool has_threads(int others) {
    thread_local int given = 0;
    if (given >= others) return true;
    std::vector<std::thread> tried;
    try {
        for (int i = 0; i < others; ++i) tried.emplace_back([] {});
        given = others;
    } catch (const std::exception&) {
    }
    for (std::thread& thread : tried) thread.join();
    return given >= others;
}

struct Region {
    void (*work)(void*, int, int);
    void* argument;
    int threads;
};

}  // namespace

void set_openmp(const OpenMP& runtime) { openmp = runtime; }
void share_openmp(bool shared) { is_shared = shared && openmp.parallel != nullptr; }

bool run_in_openmp(int threads, void (*work)(void*, int, int), void* argument) {
    if (!is_shared || is_forked || openmp.in_parallel()) return false;
    // Always all of its threads: it ends those that a region leaves out, and has to start them again for PyTorch.
    const int all = std::max(threads, num_threads());
    if (!has_threads(all - 1)) return false;
    Region region{work, argument, threads};
    openmp.parallel(
        [](void* pointer) {
            const Region& of = *static_cast<Region*>(pointer);
            const int size = std::min(of.threads, openmp.num_threads()), member = openmp.thread_num();
            if (member < size) of.work(of.argument, member, size);
        },
        &region, static_cast<unsigned>(all), 0);
    return true;
}

}  // namespace sdw
