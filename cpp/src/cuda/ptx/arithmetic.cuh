// What C++ has no name for.
#pragma once

namespace marlinq::cuda::ptx {

/// a / b to about 2 units in the last place; b must be normal and below 2^126.
__device__ __forceinline__ float divide_roughly(float a, float b) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(b));
  return __fmul_rn(a, reciprocal);
}

/// n / d for 0 <= n and 0 < d; quick below 2^23, where a float holds n and the quotient is at most 1
/// off.
__device__ __forceinline__ int divide(int n, int d) {
  if (n >= 1 << 23) return n / d;
  const int guess =
      static_cast<int>(divide_roughly(static_cast<float>(n), static_cast<float>(d)));
  const int rest = n - guess * d;
  return rest < 0 ? guess - 1 : (rest >= d ? guess + 1 : guess);
}

/// The compiler may no longer assume what it knows of `value`: it works out again what depends on it,
/// instead of keeping that in registers.
__device__ __forceinline__ void forget_value_of(int& value) { asm volatile("" : "+r"(value)); }

}  // namespace marlinq::cuda::ptx
