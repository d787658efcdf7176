// The kernels that every pair of activation type and code width has.
#pragma once

#include <array>

#include "cuda/arch/sm80/instance.cuh"

namespace marlinq::cuda::sm80 {

template <class T, int kBits>
constexpr std::array<Instance, kInstanceCount> instance_list() {
  return {
      // token tiles, most warps, promotes
      strip_instance<T, kBits, 1, 16, true>(),
      strip_instance<T, kBits, 2, 16, false>(),
      // feature warps, token warps, row warps, token tiles of a warp
      tile_instance<T, kBits, 2, 1, 2, 4>({.start = 2.47f, .step = {0.658f, 1.126f, 1.377f}, .tile = 1.41f, .cut = 1.92f, .part = 0.13f, .block = 0.008f, .uneven = 0.75f}),
      tile_instance<T, kBits, 2, 1, 4, 4>({.start = 4.56f, .step = {0.885f, 0.0f, 0.0f}, .tile = 3.54f, .cut = 1.80f, .part = 0.0f, .block = 0.0f, .uneven = 2.72f}),
      tile_instance<T, kBits, 4, 1, 1, 4>({.start = 0.0f, .step = {0.661f, 1.059f, 1.325f}, .tile = 0.0f, .cut = 3.61f, .part = 0.54f, .block = 0.011f, .uneven = 0.13f}),
      tile_instance<T, kBits, 4, 1, 3, 4>({.start = 3.52f, .step = {1.285f, 0.0f, 0.0f}, .tile = 2.31f, .cut = 2.29f, .part = 0.0f, .block = 0.017f, .uneven = 2.38f}),
      tile_instance<T, kBits, 2, 1, 4, 8>({.start = 5.05f, .step = {1.350f, 0.0f, 0.0f}, .tile = 3.61f, .cut = 2.21f, .part = 0.0f, .block = 0.012f, .uneven = 3.62f}),
      tile_instance<T, kBits, 4, 1, 1, 8>({.start = 1.66f, .step = {0.943f, 1.450f, 0.0f}, .tile = 3.01f, .cut = 3.07f, .part = 0.56f, .block = 0.021f, .uneven = 0.69f}),
      tile_instance<T, kBits, 4, 1, 2, 8>({.start = 4.95f, .step = {1.323f, 0.0f, 0.0f}, .tile = 5.40f, .cut = 2.77f, .part = 0.18f, .block = 0.023f, .uneven = 2.49f}),
  };
}

}  // namespace marlinq::cuda::sm80
