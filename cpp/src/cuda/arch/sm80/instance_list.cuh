// The kernels that every pair of activation type and code width has.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>

#include "cuda/arch/sm80/instance.cuh"

namespace marlinq::cuda::sm80 {

// In the order of TileCost: start, steps, tile, cut, part, block, uneven. Fitted to the lines of tests/bench/sm80_plans of
// an H200 (seven layers of Llama models, m = 32 to 2048, float16; bfloat16 takes as long).
struct TileCosts {
  static constexpr TileCost k128x32x2{3.36, {0.657, 0.977, 1.333}, 1.47, 0.43, 0.22, 0.009, 1.95};
  static constexpr TileCost k128x32x4{4.57, {0.936}, 2.89, 1.31, 0.00, 0.004, 3.29};
  static constexpr TileCost k256x32x1{2.98, {0.596, 1.052, 1.341}, 0.00, 1.83, 0.54, 0.004, 1.06};
  static constexpr TileCost k256x32x3{4.60, {1.258}, 5.27, 0.97, 0.28, 0.005, 3.77};
  static constexpr TileCost k128x64x4{6.00, {1.328}, 4.88, 1.35, 0.00, 0.011, 4.64};
  static constexpr TileCost k256x64x1{3.19, {0.912, 1.459}, 2.62, 2.73, 0.54, 0.011, 2.25};
  static constexpr TileCost k256x64x2{5.58, {1.320}, 4.12, 1.80, 0.37, 0.012, 1.65};
};

template <class T, int kBits>
constexpr std::array<Instance, kInstanceCount> instance_list() {
  using Costs = TileCosts;
  return {
      // token tiles, most warps, promotes
      strip_instance<T, kBits, 1, 16, true>(),
      strip_instance<T, kBits, 2, 16, false>(),
      // feature warps, row warps, token tiles of a warp
      tile_instance<T, kBits, 2, 2, 4>(Costs::k128x32x2),
      tile_instance<T, kBits, 2, 4, 4>(Costs::k128x32x4),
      tile_instance<T, kBits, 4, 1, 4>(Costs::k256x32x1),
      tile_instance<T, kBits, 4, 3, 4>(Costs::k256x32x3),
      tile_instance<T, kBits, 2, 4, 8>(Costs::k128x64x4),
      tile_instance<T, kBits, 4, 1, 8>(Costs::k256x64x1),
      tile_instance<T, kBits, 4, 2, 8>(Costs::k256x64x2),
  };
}

}  // namespace marlinq::cuda::sm80
