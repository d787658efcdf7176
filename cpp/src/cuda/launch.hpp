// Launches of kernels: their attributes, and shared memory beyond what a block has without asking.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

#include "cuda/cuda_check.hpp"

namespace marlinq::cuda {

/// Lets a kernel have all the shared memory of a block, once for each device.
template <class... Args>
void allow_shared_memory(void (*kernel)(Args...), std::atomic<std::uint64_t>& devices_done) {
  int device = 0;
  MARLINQ_CUDA_CHECK(cudaGetDevice(&device));
  const std::uint64_t bit = device < 64 ? std::uint64_t{1} << device : 0;
  if ((devices_done.load(std::memory_order_acquire) & bit) != 0) return;
  int most = 0;
  MARLINQ_CUDA_CHECK(
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  cudaFuncAttributes attributes{};
  MARLINQ_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  MARLINQ_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          most - static_cast<int>(attributes.sharedSizeBytes)));
  devices_done.fetch_or(bit, std::memory_order_release);
}

struct LaunchShape {
  dim3 grid;
  int threads = 0;  // of a block
  std::int64_t shared_bytes = 0;
  /// The kernel may start before the one before it has ended, and waits for it by itself.
  bool dependent = false;
  cudaStream_t stream = nullptr;
};

template <class... Args>
void launch_kernel(void (*kernel)(Args...), const LaunchShape& shape, const Args&... args) {
  cudaLaunchAttribute dependent{};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
  config.stream = shape.stream;
  config.attrs = &dependent;
  config.numAttrs = shape.dependent ? 1 : 0;
  MARLINQ_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace marlinq::cuda
