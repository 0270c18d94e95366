// What the CUDA half of the package was built with and finds at run time. Compiled only where nvcc is found.
#pragma once

#include <string>
#include <vector>

namespace sdw {

// "NVIDIA H200, sm_90" for the current device, or why there is none ("no CUDA-capable device is detected").
std::string cuda_device_description();

// What the kernels were compiled for: 80 is sm_80. The last is there as PTX too, from which a driver compiles for newer
// devices, unless the build named architectures of its own.
std::vector<int> cuda_architectures();

// Why a device cannot run the kernels, in a sentence; empty where it can.
std::string cuda_obstacle(int device);

// CUDA runtime the core was compiled with, as 1000 * major + 10 * minor.
int cuda_runtime_version();

}  // namespace sdw
