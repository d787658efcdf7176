// Barriers among some warps of a block.
#pragma once

namespace marlinq::cuda::ptx {

/// Barrier `id` (1 to 15; 0 is __syncthreads) of so many threads, a multiple of 32: orders their
/// accesses of shared memory as __syncthreads does.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace marlinq::cuda::ptx
