// The one place that launches kernels, and the one header that a kernel file includes for CUDA.
//
// Under nvcc this is CUDA. Compiled by the host compiler with SDW_EMULATE_CUDA the same kernels run on the CPU
// (tests/emulator/emulator.h), so that tests see the kernels themselves on machines without a GPU. For that a kernel
// file keeps to:
// `__global__` functions with parameters passed by value, dynamic shared memory only (shared_memory()), the built-ins
// that emulator.h lists, the wrappers of mma.h in place of inline assembly, and spin_pause() in every loop that waits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef SDW_EMULATE_CUDA

#include "emulator.h"  // from tests/emulator, by the include path

#else

#include <cuda_runtime.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "sdw_fast's CUDA kernels need sm_80 (Ampere) or newer: set CUDAARCHS accordingly, or SDW_CUDA=0"
#endif

#define SDW_HOST_DEVICE __host__ __device__

namespace sdw {

// Throws with the failed call's name and CUDA's own words.
inline void check_cuda(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // a failure reported here must not surface in the caller's next CUDA call
    throw std::runtime_error(std::string(what) + ": CUDA error: " + cudaGetErrorString(status));
}

template <typename... Params>
std::string kernel_name(void (*kernel)(Params...)) {
#if CUDART_VERSION >= 12030
    const char* name = nullptr;
    if (cudaFuncGetName(&name, reinterpret_cast<const void*>(kernel)) == cudaSuccess) return name;
#endif
    return "a kernel";
}

// Lets blocks of `kernel` have more than the 48 KiB of shared memory that need no asking.
template <typename... Params>
void allow_shared(void (*kernel)(Params...), size_t shared_bytes) {
    if (shared_bytes <= 48 * 1024) return;
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               "cudaFuncSetAttribute");
}

// The launch's configuration; `attributes` must outlive it. cluster: blocks of a cluster (sm_90), 1: none.
inline cudaLaunchConfig_t configure(cudaLaunchAttribute (&attributes)[2], bool cooperative, int cluster, dim3 grid,
                                    dim3 block, size_t shared_bytes, void* stream) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    if (cooperative) {
        cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
        attribute.id = cudaLaunchAttributeCooperative;
        attribute.val.cooperative = 1;
    }
    if (cluster > 1) {
        cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
    return config;
}

template <typename... Params, typename... Args>
void launch_with(bool cooperative, int cluster, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                 void* stream, Args... args) {
    allow_shared(kernel, shared_bytes);
    cudaLaunchAttribute attributes[2];
    const auto config = configure(attributes, cooperative, cluster, grid, block, shared_bytes, stream);
    const cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
    if (status != cudaSuccess) check_cuda(status, kernel_name(kernel).c_str());
}

// Enqueues `kernel` on `stream` (a cudaStream_t, null: the default one). Blocks may run in any order.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, Args... args) {
    launch_with(false, 1, kernel, grid, block, shared_bytes, stream, args...);
}

// The same with all blocks on the chip at once, so that they may wait for each other; at most resident_blocks().
template <typename... Params, typename... Args>
void launch_cooperative(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                        Args... args) {
    launch_with(true, 1, kernel, grid, block, shared_bytes, stream, args...);
}

// The same in clusters of `cluster` blocks, neighbors in x, which may meet_cluster().
template <typename... Params, typename... Args>
void launch_clusters(int cluster, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                     Args... args) {
    launch_with(true, cluster, kernel, grid, block, shared_bytes, stream, args...);
}

// Makes `device` current for this thread: a call for a binding, before it launches.
inline void use_device(int device) { check_cuda(cudaSetDevice(device), "cudaSetDevice"); }

// Multiprocessors of the current device.
inline int multiprocessors() {
    int device = 0, count = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return count;
}

// Shared memory in bytes that one block may ask for on the current device.
inline size_t shared_limit() {
    int device = 0, bytes = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "cudaDeviceGetAttribute");
    return static_cast<size_t>(bytes);
}

// Blocks of `kernel` that the current device holds at one time.
template <typename... Params>
int resident_blocks(void (*kernel)(Params...), int threads, size_t shared_bytes) {
    allow_shared(kernel, shared_bytes);
    int per_multiprocessor = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, threads, shared_bytes),
               "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    return per_multiprocessor * multiprocessors();
}

// The same in clusters of `cluster` blocks; none on devices that have no clusters.
template <typename... Params>
int resident_blocks(int cluster, void (*kernel)(Params...), int threads, size_t shared_bytes) {
    int device = 0, major = 0, clusters = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    if (cluster == 1) return resident_blocks(kernel, threads, shared_bytes);
    if (major < 9) return 0;
    allow_shared(kernel, shared_bytes);
    cudaLaunchAttribute attributes[2];
    const auto config = configure(attributes, false, cluster, dim3(static_cast<unsigned>(cluster)),
                                  dim3(static_cast<unsigned>(threads)), shared_bytes, nullptr);
    check_cuda(cudaOccupancyMaxActiveClusters(&clusters, reinterpret_cast<const void*>(kernel), &config),
               "cudaOccupancyMaxActiveClusters");
    return clusters * cluster;
}

inline void set_zero(void* data, size_t bytes, void* stream) {
    check_cuda(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

#ifdef __CUDACC__
// The block's dynamic shared memory, aligned to 16 bytes.
__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char sdw_shared_memory[];
    return sdw_shared_memory;
}

// In a loop that waits for another thread's store.
__device__ inline void spin_pause() {}
#endif

}  // namespace sdw

#endif
