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
  static constexpr TileCost k128x32{0.93, 0.501, 0.75, 0.52, 0.00, 0.022, 0.53};
  static constexpr TileCost k256x32{1.87, 0.797, 0.27, 0.00, 0.42, 0.016, 0.65};
  static constexpr TileCost k128x64{0.11, 0.596, 1.28, 0.55, 0.25, 0.024, 0.60};
  static constexpr TileCost k256x64{0.00, 1.024, 2.42, 0.09, 0.34, 0.029, 0.48};
  static constexpr TileCost k128x128{0.00, 0.848, 1.22, 1.34, 0.38, 0.026, 0.77};
  static constexpr TileCost k256x128{0.00, 1.540, 4.41, 2.58, 0.81, 0.030, 2.08};
};

template <class T, int kBits>
constexpr std::array<Instance, kInstanceCount> instance_list() {
  using Costs = TileCosts;
  return {
      // token tiles, streams x
      strip_instance<T, kBits, 1, false>(),
      strip_instance<T, kBits, 1, true>(),
      strip_instance<T, kBits, 2, false>(),
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
  };
}

}  // namespace marlinq::cuda::sm90
