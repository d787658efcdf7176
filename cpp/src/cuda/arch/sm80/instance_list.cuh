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
      tile_instance<T, kBits, 4, 1, 1, 4>(),
      tile_instance<T, kBits, 2, 1, 2, 4>(),
      tile_instance<T, kBits, 2, 1, 4, 4>(),
      tile_instance<T, kBits, 2, 1, 6, 4>(),
      tile_instance<T, kBits, 4, 1, 3, 4>(),
      tile_instance<T, kBits, 4, 1, 1, 8>(),
      tile_instance<T, kBits, 4, 1, 2, 8>(),
      tile_instance<T, kBits, 2, 1, 2, 8>(),
      tile_instance<T, kBits, 2, 1, 4, 8>(),
  };
}

}  // namespace marlinq::cuda::sm80
