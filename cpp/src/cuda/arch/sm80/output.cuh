// The last step of every sm_80 kernel: bias, one rounding, the caller's row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/problem.hpp"

namespace marlinq::cuda::sm80 {

__device__ __forceinline__ void store_output(const GemmProblem& p, int token, int feature,
                                             float value) {
  if (p.weight.bias != nullptr) value += p.weight.bias[feature];
  const int64_t place = token * p.y_stride + feature;
  switch (p.y_type) {
    case FloatType::kF32:
      static_cast<float*>(p.y)[place] = value;
      break;
    case FloatType::kF16:
      static_cast<__half*>(p.y)[place] = __float2half_rn(value);
      break;
    case FloatType::kBF16:
      static_cast<__nv_bfloat16*>(p.y)[place] = __float2bfloat16_rn(value);
      break;
  }
}

/// Two features, where they are there, of which the first is even.
__device__ __forceinline__ void store_output_pair(const GemmProblem& p, int token, int feature,
                                                  float2 value) {
  if (feature < p.weight.n) store_output(p, token, feature, value.x);
  if (feature + 1 < p.weight.n) store_output(p, token, feature + 1, value.y);
}

template <class Y>
__device__ __forceinline__ Y round_to(float value) {
  if constexpr (std::is_same_v<Y, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<Y, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

/// Two outputs of type T, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t round_pair(float first, float second) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

}  // namespace marlinq::cuda::sm80
