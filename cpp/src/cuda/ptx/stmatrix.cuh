// stmatrix and the hand-over of registers between warpgroups; compute capability 9.0 and 9.0a.
#pragma once

#include <cstdint>

namespace marlinq::cuda::ptx {

/// Four 8 x 8 matrices of 16-bit elements, transposed: of each a lane 4 g + t holds row g, columns 2t and
/// 2t + 1, and lane 8 i + c has the address of column c of matrix i.
__device__ __forceinline__ void stmatrix_x4_transposed(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
}

/// By all warps of a warpgroup.
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace marlinq::cuda::ptx
