// A division whose result a block waits for.
#pragma once

#include "cuda/ptx/arithmetic.cuh"

namespace marlinq::cuda::sm90 {

/// n / d for 0 <= n < 2^21 and d > 0, without a division: where a block waits for the result, it is to come soon.
/// n + 1/2 is exact, and its quotient is further from all integers than what is rounded.
struct RoughDivider {
  int divisor = 1;
  float reciprocal = 1.0f;

  RoughDivider() = default;
  __device__ __forceinline__ explicit RoughDivider(int d)
      : divisor(d), reciprocal(ptx::divide_roughly(1.0f, static_cast<float>(d))) {}

  __device__ __forceinline__ int divide(int n) const {
    return __float2int_rz(__fmul_rn(static_cast<float>(n) + 0.5f, reciprocal));
  }
};

}  // namespace marlinq::cuda::sm90
