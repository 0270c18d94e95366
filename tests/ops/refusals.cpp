// Memory and threads that the compiled core asks for can be refused, and what it frees can take long. Loaded as the
// first global library of a process, this one's operator new and start of a thread stand in for libstdc++'s.
#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>

namespace {

std::atomic<uintptr_t> core_begin{0}, core_end{0};  // where the core's code lies
std::atomic<long> asked{0}, first{0}, last{0};      // requests number first to last are refused, counted from 1
std::atomic<long> for_thread{0};                    // number of the first request for a thread

std::atomic<bool> no_threads{false};  // whoever asks for one
std::atomic<int> milliseconds{0};     // to free a large block

bool is_core(const void* caller) {
    const auto address = reinterpret_cast<uintptr_t>(caller);
    return address >= core_begin && address < core_end;
}

bool refuses(const void* caller) {
    if (!is_core(caller)) return false;
    const long number = ++asked;
    return number >= first && number <= last;
}

void* allocated(size_t size, size_t alignment, const void* caller) {
    if (refuses(caller)) return nullptr;
    return std::aligned_alloc(alignment, (size / alignment + 1) * alignment);
}

void* or_throw(void* memory) {
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}

constexpr size_t kUsual = alignof(std::max_align_t);

}  // namespace

extern "C" void watch(uintptr_t begin, uintptr_t end) { core_begin = begin, core_end = end; }
extern "C" void refuse(long from, long to) { asked = 0, for_thread = 0, first = from, last = to; }
extern "C" long requests() { return asked; }
extern "C" long request_for_thread() { return for_thread; }
extern "C" void refuse_threads(int yes) { no_threads = yes != 0; }
extern "C" void delay(int each) { milliseconds = each; }

extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*run)(void*), void* own) {
    if (no_threads) return EAGAIN;
    static const auto create = reinterpret_cast<decltype(&pthread_create)>(dlsym(RTLD_NEXT, "pthread_create"));
    return create(thread, attributes, run, own);
}

void* operator new(size_t size) { return or_throw(allocated(size, kUsual, __builtin_return_address(0))); }
void* operator new(size_t size, const std::nothrow_t&) noexcept {
    return allocated(size, kUsual, __builtin_return_address(0));
}
void* operator new(size_t size, std::align_val_t alignment) {
    return or_throw(allocated(size, static_cast<size_t>(alignment), __builtin_return_address(0)));
}
void* operator new(size_t size, std::align_val_t alignment, const std::nothrow_t&) noexcept {
    return allocated(size, static_cast<size_t>(alignment), __builtin_return_address(0));
}

void operator delete(void* memory, std::align_val_t alignment) noexcept {
    constexpr std::align_val_t kHugePage{1 << 21};
    if (alignment == kHugePage && is_core(__builtin_return_address(0)))
        std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
    std::free(memory);
}

void std::thread::_M_start_thread(_State_ptr state, void (*depend)()) {
    const bool refused = refuses(__builtin_return_address(0));
    if (is_core(__builtin_return_address(0)) && for_thread == 0) for_thread = asked.load();
    if (refused) throw std::system_error(EAGAIN, std::generic_category());
    using Start = void (*)(std::thread*, _State_ptr, void (*)());
    constexpr char kName[] = "_ZNSt6thread15_M_start_threadESt10unique_ptrINS_6_StateESt14default_deleteIS1_EEPFvvE";
    static const auto start = reinterpret_cast<Start>(dlsym(RTLD_NEXT, kName));
    start(this, std::move(state), depend);
}
