#include "sdw/memory.h"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <limits>
#include <mutex>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sdw {
namespace {

constexpr std::align_val_t kHugePage{size_t{1} << 21};
constexpr size_t kKeepBytes = size_t{1} << 30;
constexpr size_t kKeepBlocks = 4;

struct Block {
    void* data;
    size_t bytes;
};

// The blocks kept, oldest first, with room for the one that comes too many. Plain memory: to free a buffer allocates
// nothing, and a tape may be freed as late as the interpreter's end.
Block kept[kKeepBlocks + 1];
size_t kept_count = 0, kept_bytes = 0;

std::mutex kept_mutex;
#if !defined(_WIN32)
// A fork waits until no thread is inside, as the child has only the thread that forked: none would ever come out.
[[maybe_unused]] const int fork_waits =
    pthread_atfork([] { kept_mutex.lock(); }, [] { kept_mutex.unlock(); }, [] { kept_mutex.unlock(); });
#endif

Block take(size_t position) {
    const Block block = kept[position];
    std::copy(kept + position + 1, kept + kept_count, kept + position);
    --kept_count;
    kept_bytes -= block.bytes;
    return block;
}

}  // namespace

size_t available_memory() {
    std::ifstream meminfo("/proc/meminfo");
    std::string key, unit;
    size_t kibibytes = 0;
    while (meminfo >> key >> kibibytes) {
        if (key == "MemAvailable:") {
            const std::lock_guard<std::mutex> lock(kept_mutex);
            return kibibytes * 1024 + kept_bytes;
        }
        std::getline(meminfo, unit);
    }
    return std::numeric_limits<size_t>::max();
}

Buffer::Buffer(size_t bytes) {
    constexpr auto unit = static_cast<size_t>(kHugePage);
    bytes_ = (bytes / unit + 1) * unit;
    {
        const std::lock_guard<std::mutex> lock(kept_mutex);
        for (size_t i = 0; i < kept_count; ++i) {
            if (kept[i].bytes < bytes_ || kept[i].bytes > 2 * bytes_) continue;
            const Block block = take(i);
            data_ = block.data;
            bytes_ = block.bytes;
            return;
        }
    }
    data_ = ::operator new(bytes_, kHugePage, std::nothrow);
    if (data_ == nullptr) throw OutOfMemory("could not allocate " + std::to_string(bytes_) + " bytes");
#if defined(__linux__)
    madvise(data_, bytes_, MADV_HUGEPAGE);  // advice: without huge pages it merely runs slower
#endif
}

Buffer::~Buffer() {
    const std::lock_guard<std::mutex> lock(kept_mutex);
    kept[kept_count++] = {data_, bytes_};
    kept_bytes += bytes_;
    while (kept_count > kKeepBlocks || kept_bytes > kKeepBytes) ::operator delete(take(0).data, kHugePage);
}

}  // namespace sdw
