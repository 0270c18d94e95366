// What the kernels run on: instruction set and threads.
#pragma once

#include <string>
#include <vector>

namespace sdw {

// Instruction sets that the kernels are compiled for, weakest first.
enum class Isa { portable, avx2, avx512 };

// Those that this processor can run (and that were compiled), weakest first; never empty.
const std::vector<Isa>& supported_isas();

// The one in use: the strongest supported, or the one that the environment variable SDW_ISA names.
// Throws std::invalid_argument if SDW_ISA names one that is unknown or not supported here.
Isa active_isa();

const char* isa_name(Isa isa);

// Threads that a kernel uses at most; 1 until set.
int num_threads();
void set_num_threads(int threads);  // throws std::invalid_argument if threads < 1

}  // namespace sdw
