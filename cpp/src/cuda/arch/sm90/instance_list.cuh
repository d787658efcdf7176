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
  static constexpr TileCost k128x32{0.62, 0.497, 0.61, 0.74, 0.00, 0.026, 0.51};
  static constexpr TileCost k256x32{0.77, 0.770, 0.83, 0.34, 0.24, 0.029, 0.60};
  static constexpr TileCost k128x64{0.40, 0.592, 0.83, 0.85, 0.05, 0.032, 0.44};
  static constexpr TileCost k256x64{0.00, 1.014, 2.15, 0.61, 0.28, 0.032, 0.37};
  static constexpr TileCost k128x128{0.00, 0.804, 2.21, 1.30, 0.00, 0.038, 0.80};
  static constexpr TileCost k256x128{3.50, 1.467, 1.60, 2.85, 0.77, 0.037, 2.16};
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
      tile_instance<T, kBits, 4, 1, 32>(Costs::k256x32),
      tile_instance<T, kBits, 2, 1, 64>(Costs::k128x64),
      tile_instance<T, kBits, 4, 1, 64>(Costs::k256x64),
      tile_instance<T, kBits, 2, 1, 128>(Costs::k128x128),
      tile_instance<T, kBits, 2, 2, 128>(Costs::k256x128),
      tile_instance<T, kBits, 2, 1, 256>(Costs::k128x256),
  };
}

}  // namespace marlinq::cuda::sm90
