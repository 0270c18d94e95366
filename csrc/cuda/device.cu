#include <cuda_runtime.h>

#include "sdw/cuda_device.h"

namespace sdw {
namespace {

// Compiled for what the ops are compiled for: where this one can run, so can they.
__global__ void probe() {}

// "Tesla T4, sm_75"
std::string name_of(const cudaDeviceProp& device) {
    return std::string(device.name) + ", sm_" + std::to_string(device.major) + std::to_string(device.minor);
}

}  // namespace

std::string cuda_device_description() {
    int device = 0;
    cudaDeviceProp properties;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaGetDeviceProperties(&properties, device);
    if (status != cudaSuccess) {
        cudaGetLastError();  // a failed query must not surface in the caller's next CUDA call
        return cudaGetErrorString(status);
    }
    return name_of(properties);
}

std::vector<int> cuda_architectures() {
    const int list[] = {__CUDA_ARCH_LIST__};
    std::vector<int> architectures;
    for (const int number : list) architectures.push_back(number / 10);
    return architectures;
}

std::string cuda_obstacle(int device) {
    int current = 0;
    cudaDeviceProp properties;
    cudaFuncAttributes attributes;
    cudaError_t status = cudaGetDevice(&current);
    if (status == cudaSuccess) status = cudaGetDeviceProperties(&properties, device);
    if (status == cudaSuccess) status = cudaSetDevice(device);
    if (status == cudaSuccess) {
        status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe));
        cudaSetDevice(current);
        if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction ||
            status == cudaErrorUnsupportedPtxVersion) {
            cudaGetLastError();
            std::string compiled;
            for (const int number : cuda_architectures()) compiled += ", sm_" + std::to_string(number);
            return name_of(properties) +
                   ", cannot run the CUDA kernels, which need sm_80 or newer and were compiled for " +
                   compiled.substr(2);
        }
    }
    if (status == cudaSuccess) return "";
    cudaGetLastError();
    return cudaGetErrorString(status);
}

int cuda_runtime_version() { return CUDART_VERSION; }

}  // namespace sdw
