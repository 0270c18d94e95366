// Work in the threads of PyTorch's OpenMP runtime (sdw/openmp.h).
#pragma once

namespace sdw {

// Calls work(argument, member, size) in `size` <= `threads` members at once, this thread being number 0, and returns
// when all have ended. False, and nothing is called, where the runtime is not there, not shared or busy with this very
// thread, or the system refuses threads, for which it would end the process.
bool run_in_openmp(int threads, void (*work)(void* argument, int member, int size), void* argument);

}  // namespace sdw
