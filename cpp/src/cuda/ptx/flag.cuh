// Flags in global memory, by which a block tells another that what it wrote may be read.
#pragma once

#include <cstdint>

namespace marlinq::cuda::ptx {

/// After a block barrier, by one thread: all that the block wrote before can be seen by whoever takes
/// the flag.
__device__ __forceinline__ void raise_flag(uint32_t* flag) {
  asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}

/// By one thread, before a block barrier.
__device__ __forceinline__ void wait_for_flag(const uint32_t* flag, bool raised) {
  uint32_t value = 0;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  } while ((value != 0) != raised);
}

/// After a block barrier, by one thread: all that the block read before may be written again by whoever
/// waits for that.
__device__ __forceinline__ void lower_flag(uint32_t* flag) {
  asm volatile("st.release.gpu.global.u32 [%0], 0;" ::"l"(flag) : "memory");
}

/// Waits for the flag and lowers it. By one thread, before a block barrier. Who raises it again does so
/// in a later kernel.
__device__ __forceinline__ void take_flag(uint32_t* flag) {
  wait_for_flag(flag, true);
  *flag = 0;
}

}  // namespace marlinq::cuda::ptx
