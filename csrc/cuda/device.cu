#include <cuda_runtime.h>

#include "sdw/cuda_device.h"

namespace sdw {

std::string cuda_device_description() {
    int device = 0;
    cudaDeviceProp properties;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaGetDeviceProperties(&properties, device);
    if (status != cudaSuccess) {
        cudaGetLastError();  // a failed query must not surface in the caller's next CUDA call
        return cudaGetErrorString(status);
    }
    return std::string(properties.name) + ", sm_" + std::to_string(properties.major) + std::to_string(properties.minor);
}

int cuda_runtime_version() { return CUDART_VERSION; }

}  // namespace sdw
