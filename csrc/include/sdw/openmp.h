// PyTorch's own threads, in which the kernels run where they can.
//
// After each of PyTorch's parallel operations the threads of its OpenMP runtime look for more work, for milliseconds,
// on the cores that the next kernel wants. Threads of ours would share those cores with them; handed to the same
// runtime, the kernel is the work that they look for, and starts at once. Nothing is linked: who loads PyTorch says
// where in the process the runtime's functions are.
#pragma once

namespace sdw {

// Functions of GNU's OpenMP runtime, which LLVM's and Intel's offer too.
struct OpenMP {
    void (*parallel)(void (*region)(void*), void* argument, unsigned threads, unsigned flags) = nullptr;
    int (*num_threads)() = nullptr;  // of the region that calls it
    int (*thread_num)() = nullptr;
    int (*in_parallel)() = nullptr;
};

// The runtime of this process; called once, before any kernel.
void set_openmp(const OpenMP& runtime);

// Whether that runtime's threads are as many as num_threads(), so that a region of as many changes nothing for PyTorch.
// False until set, and for good in a forked child, where the runtime would wait for threads that are not there.
void share_openmp(bool shared);

}  // namespace sdw
