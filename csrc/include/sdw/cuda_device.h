// What the CUDA half of the package was built with and finds at run time. Compiled only where nvcc is found.
#pragma once

#include <string>

namespace sdw {

// "NVIDIA H200, sm_90" for the current device, or why there is none ("no CUDA-capable device is detected").
std::string cuda_device_description();

// CUDA runtime the core was compiled with, as 1000 * major + 10 * minor.
int cuda_runtime_version();

}  // namespace sdw
