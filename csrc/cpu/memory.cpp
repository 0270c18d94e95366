#include "sdw/memory.h"

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sdw {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kKeepBytes = size_t{1} << 30;
constexpr size_t kKeepBlocks = 4;

struct Block {
    void* data;
    size_t bytes;
};

std::mutex kept_mutex;
// Oldest first. Never destroyed: a tape may be freed as late as the interpreter's end.
std::vector<Block>& kept = *new std::vector<Block>;

size_t total_kept() {
    size_t bytes = 0;
    for (const Block& block : kept) bytes += block.bytes;
    return bytes;
}

}  // namespace

size_t available_memory() {
    std::ifstream meminfo("/proc/meminfo");
    std::string key, unit;
    size_t kibibytes = 0;
    while (meminfo >> key >> kibibytes) {
        if (key == "MemAvailable:") {
            const std::lock_guard<std::mutex> lock(kept_mutex);
            return kibibytes * 1024 + total_kept();
        }
        std::getline(meminfo, unit);
    }
    return std::numeric_limits<size_t>::max();
}

Buffer::Buffer(size_t bytes) : data_(nullptr), bytes_((bytes / kHugePage + 1) * kHugePage) {
    {
        const std::lock_guard<std::mutex> lock(kept_mutex);
        for (auto block = kept.begin(); block != kept.end(); ++block) {
            if (block->bytes < bytes_ || block->bytes > 2 * bytes_) continue;
            data_ = block->data;
            bytes_ = block->bytes;
            kept.erase(block);
            return;
        }
    }
    data_ = std::aligned_alloc(kHugePage, bytes_);
    if (data_ == nullptr) throw OutOfMemory("could not allocate " + std::to_string(bytes_) + " bytes");
#if defined(__linux__)
    madvise(data_, bytes_, MADV_HUGEPAGE);  // advice: without huge pages it merely runs slower
#endif
}

Buffer::~Buffer() {
    const std::lock_guard<std::mutex> lock(kept_mutex);
    kept.push_back({data_, bytes_});
    while (kept.size() > kKeepBlocks || total_kept() > kKeepBytes) {
        std::free(kept.front().data);
        kept.erase(kept.begin());
    }
}

}  // namespace sdw
