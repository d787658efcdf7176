// What C++ has no name for.
#pragma once

namespace marlinq::cuda::ptx {

/// a / b to about 2 units in the last place; b must be normal and below 2^126.
__device__ __forceinline__ float divide_roughly(float a, float b) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(b));
  return __fmul_rn(a, reciprocal);
}

/// The compiler may no longer assume where `value` comes from: it keeps it in a register instead of
/// working it out again, and works out again what depends on it.
__device__ __forceinline__ void forget_origin(int& value) { asm volatile("" : "+r"(value)); }

}  // namespace marlinq::cuda::ptx
