// What stands between the two layers of an expert.
#pragma once

#include "marlinq/moe_block.hpp"

namespace marlinq::cuda {

/// act(g, u) of marlinq/moe_block.hpp.
__device__ __forceinline__ float activate(Activation activation, float g, float u) {
  constexpr float kLimit = 7.0f;
  constexpr float kSteepness = 1.702f;
  switch (activation) {
    case Activation::kGelu:
      return 0.5f * g * (1.0f + erff(g * 0.70710678f)) * u;
    case Activation::kGeluTanh:
      return 0.5f * g * (1.0f + tanhf(0.79788456f * (g + 0.044715f * g * g * g))) * u;
    case Activation::kClampedSwiglu: {
      const float gate = fminf(g, kLimit);
      const float up = fminf(fmaxf(u, -kLimit), kLimit);
      return (up + 1.0f) * (gate / (1.0f + __expf(-kSteepness * gate)));
    }
    case Activation::kSilu:
      break;
  }
  return g / (1.0f + __expf(-g)) * u;
}

}  // namespace marlinq::cuda
