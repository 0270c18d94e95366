// Large buffers: predicted and checked before they are allocated, on huge pages, kept for the next call.
#pragma once

#include <cstddef>
#include <new>
#include <string>

namespace sdw {

class OutOfMemory : public std::bad_alloc {
  public:
    explicit OutOfMemory(std::string message) : message_(std::move(message)) {}
    const char* what() const noexcept override { return message_.c_str(); }

  private:
    std::string message_;
};

// Bytes that can be allocated without swapping, as the system estimates; the largest size_t where it does not say.
size_t available_memory();

// An uninitialized, 64-byte aligned block. A training loop asks for the same large block in every step, and fresh pages
// cost as much as the arithmetic of many a small problem: the last few blocks freed, at most 1 GiB, are kept and handed
// out again.
class Buffer {
  public:
    explicit Buffer(size_t bytes);
    ~Buffer();
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    float* data() const { return static_cast<float*>(data_); }

  private:
    void* data_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace sdw
