// The kernels that every pair of activation type and code width has.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>

#include "cuda/arch/sm90/instance.cuh"

namespace marlinq::cuda::sm90 {

// In the order of TileCost: start, slab, tile, cut, part, block, uneven. Fitted to lines of
// tests/bench/sm90_plans of an H100, float16 and 4 bits.
struct TileCosts {
  static constexpr TileCost k128x32{0.82, 0.433, 0.00, 1.37, 0.00, 0.025, 0.00};
  static constexpr TileCost k128x48{0.42, 0.433, 1.32, 0.83, 0.00, 0.023, 0.40};
  static constexpr TileCost k128x64{0.08, 0.510, 1.97, 0.40, 0.29, 0.019, 0.86};
  static constexpr TileCost k128x96{0.00, 0.637, 0.95, 1.76, 0.00, 0.035, 0.23};
  static constexpr TileCost k128x128{0.00, 0.713, 1.39, 1.78, 0.00, 0.041, 0.86};
  static constexpr TileCost k192x128{0.00, 1.026, 2.86, 0.00, 0.25, 0.048, 1.73};
  static constexpr TileCost k256x32{0.81, 0.661, 0.00, 1.67, 0.52, 0.018, 0.91};
  static constexpr TileCost k256x48{1.01, 0.722, 1.61, 1.04, 0.38, 0.028, 1.54};
  static constexpr TileCost k256x64{0.00, 0.821, 3.25, 1.16, 0.48, 0.032, 1.18};
  static constexpr TileCost k256x80{3.02, 0.910, 0.19, 2.36, 0.36, 0.021, 2.52};
  static constexpr TileCost k256x96{0.00, 1.052, 3.52, 1.35, 0.55, 0.017, 4.27};
  static constexpr TileCost k256x112{0.00, 1.310, 0.53, 1.73, 0.65, 0.057, 3.01};
  static constexpr TileCost k256x128{0.00, 1.356, 2.71, 3.68, 0.42, 0.042, 4.99};
  static constexpr TileCost k128x256{2.00, 1.365, 1.83, 4.00, 1.20, 0.010, 3.20};
};

template <class T, int kBits>
constexpr std::array<Instance, kInstanceCount> instance_list() {
  using Costs = TileCosts;
  return {
      // token tiles, streams x
      strip_instance<T, kBits, 1, false>(),
      strip_instance<T, kBits, 1, true>(),
      strip_instance<T, kBits, 2, true>(),
      strip_instance<T, kBits, 3, true>(),
      strip_instance<T, kBits, 4, true>(),
      // warpgroups, packed blocks of each, tokens
      tile_instance<T, kBits, 2, 1, 32>(Costs::k128x32),
      tile_instance<T, kBits, 2, 1, 48>(Costs::k128x48),
      tile_instance<T, kBits, 2, 1, 64>(Costs::k128x64),
      tile_instance<T, kBits, 2, 1, 96>(Costs::k128x96),
      tile_instance<T, kBits, 2, 1, 128>(Costs::k128x128),
      tile_instance<T, kBits, 3, 1, 128>(Costs::k192x128),
      tile_instance<T, kBits, 2, 2, 32>(Costs::k256x32),
      tile_instance<T, kBits, 2, 2, 48>(Costs::k256x48),
      tile_instance<T, kBits, 2, 2, 64>(Costs::k256x64),
      tile_instance<T, kBits, 2, 2, 80>(Costs::k256x80),
      tile_instance<T, kBits, 2, 2, 96>(Costs::k256x96),
      tile_instance<T, kBits, 2, 2, 112>(Costs::k256x112),
      tile_instance<T, kBits, 2, 2, 128>(Costs::k256x128),
      tile_instance<T, kBits, 2, 1, 256>(Costs::k128x256),
  };
}

}  // namespace marlinq::cuda::sm90
