// What stands between the two products of an expert.
#pragma once

#include "marlinq/moe_block.hpp"

namespace marlinq::cuda {

/// To some units in the last place, as what it multiplies is rounded to 16 bits.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0F, 1.0F + __expf(-x)); }

template <Activation kActivation>
__device__ __forceinline__ float activated(float gate, float up) {
  if constexpr (kActivation == Activation::kSilu) {
    return gate * sigmoid(gate) * up;
  } else if constexpr (kActivation == Activation::kGelu) {
    return 0.5F * gate * (1.0F + erff(gate * 0.70710678F)) * up;
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    return 0.5F * gate * (1.0F + tanhf(0.79788456F * (gate + 0.044715F * gate * gate * gate))) * up;
  } else {
    static_assert(kActivation == Activation::kClampedSwiglu);
    constexpr float kLimit = 7.0F;
    constexpr float kAlpha = 1.702F;
    const float g = gate > kLimit ? kLimit : gate;
    const float u = up > kLimit ? kLimit : (up < -kLimit ? -kLimit : up);
    return (u + 1.0F) * g * sigmoid(kAlpha * g);
  }
}

__device__ __forceinline__ float activated_by(Activation activation, float gate, float up) {
  switch (activation) {
    case Activation::kGelu:
      return activated<Activation::kGelu>(gate, up);
    case Activation::kGeluTanh:
      return activated<Activation::kGeluTanh>(gate, up);
    case Activation::kClampedSwiglu:
      return activated<Activation::kClampedSwiglu>(gate, up);
    case Activation::kSilu:
      break;
  }
  return activated<Activation::kSilu>(gate, up);
}

}  // namespace marlinq::cuda
