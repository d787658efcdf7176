// Programmatic dependent launch: nothing before compute capability 9.0.
#pragma once

namespace marlinq::cuda::ptx {

/// Returns when the kernel before has finished and its writes can be seen. Until then: no read of
/// what a kernel may have written, and no write.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Lets the kernel after start where there is room.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace marlinq::cuda::ptx
