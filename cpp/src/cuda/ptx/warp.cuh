// What a warp does as one; compute capability 9.0.
#pragma once

#include <cstdint>

namespace marlinq::cuda::ptx {

/// The value of one lane, as one that the compiler knows to be the same in all lanes: what follows from it is
/// worked out once for a warp then, and a copy that takes it as operand needs no loop over lanes. By all lanes.
template <class V>
__device__ __forceinline__ V same_in_warp(V value, int lane = 0) {
  return __shfl_sync(0xffffffffu, value, lane);
}

/// In one lane of a warp. By all lanes; what is asked for behind this needs no loop over lanes either.
__device__ __forceinline__ bool elected() {
  uint32_t chosen;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(chosen));
  return chosen != 0;
}

}  // namespace marlinq::cuda::ptx
