// Flags in global memory, by which a block tells another that what it wrote may be read.
#pragma once

#include <cstdint>

namespace marlinq::cuda::ptx {

/// After a block barrier, by one thread: all that the block wrote before can be seen by whoever takes
/// the flag.
__device__ __forceinline__ void raise_flag(uint32_t* flag) {
  asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}

/// Waits for the flag and lowers it. By one thread, before a block barrier. Who raises it again does so
/// in a later kernel.
__device__ __forceinline__ void take_flag(uint32_t* flag) {
  uint32_t raised = 0;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(raised) : "l"(flag) : "memory");
  } while (raised == 0);
  *flag = 0;
}

}  // namespace marlinq::cuda::ptx
