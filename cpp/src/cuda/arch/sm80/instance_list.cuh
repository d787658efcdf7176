// The kernels that every pair of activation type and code width has.
#pragma once

#include <array>

#include "cuda/arch/sm80/instance.cuh"

namespace marlinq::cuda::sm80 {

template <class T, int kBits>
constexpr std::array<Instance, kInstanceCount> instance_list() {
  // start, steps, tile, cut, part, block, uneven
  constexpr TileCost k128x32x2{2.47, {0.658, 1.126, 1.377}, 1.41, 1.92, 0.13, 0.008, 0.75};
  constexpr TileCost k128x32x4{4.56, {0.885}, 3.54, 1.80, 0.00, 0.000, 2.72};
  constexpr TileCost k256x32x1{0.00, {0.661, 1.059, 1.325}, 0.00, 3.61, 0.54, 0.011, 0.13};
  constexpr TileCost k256x32x3{3.52, {1.285}, 2.31, 2.29, 0.00, 0.017, 2.38};
  constexpr TileCost k128x64x4{5.05, {1.350}, 3.61, 2.21, 0.00, 0.012, 3.62};
  constexpr TileCost k256x64x1{1.66, {0.943, 1.450}, 3.01, 3.07, 0.56, 0.021, 0.69};
  constexpr TileCost k256x64x2{4.95, {1.323}, 5.40, 2.77, 0.18, 0.023, 2.49};
  return {
      // token tiles, most warps, promotes
      strip_instance<T, kBits, 1, 16, true>(),
      strip_instance<T, kBits, 2, 16, false>(),
      // feature warps, row warps, token tiles of a warp
      tile_instance<T, kBits, 2, 2, 4>(k128x32x2),
      tile_instance<T, kBits, 2, 4, 4>(k128x32x4),
      tile_instance<T, kBits, 4, 1, 4>(k256x32x1),
      tile_instance<T, kBits, 4, 3, 4>(k256x32x3),
      tile_instance<T, kBits, 2, 4, 8>(k128x64x4),
      tile_instance<T, kBits, 4, 1, 8>(k256x64x1),
      tile_instance<T, kBits, 4, 2, 8>(k256x64x2),
  };
}

}  // namespace marlinq::cuda::sm80
