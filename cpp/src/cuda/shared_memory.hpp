// Shared memory of kernels beyond what a block has without asking.
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

}  // namespace marlinq::cuda
