// The kernels that every pair of activation type and code width has.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>

#include "cuda/arch/sm90/instance.cuh"

namespace marlinq::cuda::sm90 {

// In the order of TileCost: start, slab, tile, cut, part, block, uneven, and of pairs part and block. Fitted to lines of
// tests/bench/sm90_plans of an H100, float16 and 4 bits.
struct TileCosts {
  static constexpr TileCost k128x32{0.82, 0.433, 0.00, 1.37, 0.00, 0.025, 0.00, 0.843, 0.016};
  static constexpr TileCost k128x48{0.42, 0.433, 1.32, 0.83, 0.00, 0.023, 0.40, 0.639, 0.016};
  static constexpr TileCost k128x64{0.08, 0.510, 1.97, 0.40, 0.29, 0.019, 0.86, 0.862, 0.009};
  static constexpr TileCost k128x96{0.00, 0.638, 0.23, 1.33, 0.15, 0.031, 0.52, 0.984, 0.027};
  static constexpr TileCost k128x128{0.00, 0.757, 0.46, 2.18, 0.00, 0.025, 1.15, 1.650, 0.026};
  static constexpr TileCost k192x128{0.00, 1.043, 1.02, 1.27, 1.40, 0.023, 1.35};
  static constexpr TileCost k256x16{1.50, 0.600, 0.00, 1.67, 0.52, 0.018, 0.91, 0.765, 0.010};
  static constexpr TileCost k256x32{0.81, 0.661, 0.00, 1.67, 0.52, 0.018, 0.91, 1.450, 0.022};
  static constexpr TileCost k256x48{1.01, 0.722, 1.61, 1.04, 0.38, 0.028, 1.54, 1.450, 0.016};
  static constexpr TileCost k256x64{0.00, 0.821, 3.25, 1.16, 0.48, 0.032, 1.18, 1.900, 0.016};
  static constexpr TileCost k256x80{0.84, 1.006, 0.07, 1.75, 0.63, 0.024, 1.91, 1.750, 0.027};
  static constexpr TileCost k256x96{0.00, 1.157, 1.40, 1.14, 0.39, 0.020, 3.41, 1.408, 0.026};
  static constexpr TileCost k256x112{0.00, 1.247, 0.62, 2.51, 0.79, 0.025, 2.33, 1.247, 0.045};
  static constexpr TileCost k256x128{0.00, 1.462, 0.44, 3.23, 0.00, 0.059, 3.35, 1.419, 0.053};
  static constexpr TileCost k128x256{0.76, 1.370, 0.58, 2.53, 0.44, 0.058, 1.53, 3.003, 0.029};
  static constexpr TileCost k128x256Pairs{1.59, 1.405, 0.70, 2.53, 0.44, 0.058, 1.53};
};

template <class T, int kBits>
constexpr std::array<Instance, kInstanceCount> instance_list() {
  using Costs = TileCosts;
  return {
      // token tiles, streams x, warps
      strip_instance<T, kBits, 1, false>(),
      strip_instance<T, kBits, 1, true>(),
      strip_instance<T, kBits, 2, true>(),
      strip_instance<T, kBits, 2, true, 12>(),
      strip_instance<T, kBits, 3, true>(),
      strip_instance<T, kBits, 4, true>(),
      // warpgroups, packed blocks of each, tokens
      tile_instance<T, kBits, 2, 1, 32>(Costs::k128x32),
      tile_instance<T, kBits, 2, 1, 48>(Costs::k128x48),
      tile_instance<T, kBits, 2, 1, 64>(Costs::k128x64),
      tile_instance<T, kBits, 2, 1, 96>(Costs::k128x96),
      tile_instance<T, kBits, 2, 1, 128>(Costs::k128x128),
      tile_instance<T, kBits, 3, 1, 128>(Costs::k192x128),
      tile_instance<T, kBits, 2, 2, 16>(Costs::k256x16),
      tile_instance<T, kBits, 2, 2, 32>(Costs::k256x32),
      tile_instance<T, kBits, 2, 2, 48>(Costs::k256x48),
      tile_instance<T, kBits, 2, 2, 64>(Costs::k256x64),
      tile_instance<T, kBits, 2, 2, 80>(Costs::k256x80),
      tile_instance<T, kBits, 2, 2, 96>(Costs::k256x96),
      tile_instance<T, kBits, 2, 2, 112>(Costs::k256x112),
      tile_instance<T, kBits, 2, 2, 128>(Costs::k256x128),
      tile_instance<T, kBits, 2, 1, 256>(Costs::k128x256),
      // and blocks of a cluster
      tile_instance<T, kBits, 2, 1, 256, 2>(Costs::k128x256Pairs),
  };
}

}  // namespace marlinq::cuda::sm90
