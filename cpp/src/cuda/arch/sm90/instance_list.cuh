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
  static constexpr TileCost k128x32{0.40, 0.391, 1.18, 1.36, 0.00, 0.018, 0.18};
  static constexpr TileCost k128x48{0.14, 0.447, 1.04, 1.69, 0.04, 0.017, 0.18};
  static constexpr TileCost k128x64{0.00, 0.506, 1.46, 1.16, 0.11, 0.021, 0.29};
  static constexpr TileCost k128x96{0.00, 0.630, 1.74, 0.60, 0.14, 0.035, 0.07};
  static constexpr TileCost k128x128{0.00, 0.768, 1.00, 1.45, 0.23, 0.029, 0.07};
  static constexpr TileCost k192x128{0.00, 1.064, 1.05, 1.20, 0.48, 0.047, 0.48};
  static constexpr TileCost k256x16{0.00, 0.560, 0.81, 1.43, 0.00, 0.026, 0.16};
  static constexpr TileCost k256x32{0.00, 0.677, 0.94, 1.03, 0.49, 0.022, 0.34};
  static constexpr TileCost k256x48{0.00, 0.758, 1.98, 0.27, 0.44, 0.033, 0.31};
  static constexpr TileCost k256x64{0.00, 0.870, 2.37, 0.45, 0.46, 0.027, 0.29};
  static constexpr TileCost k256x80{0.00, 1.001, 1.94, 1.09, 0.67, 0.029, 0.89};
  static constexpr TileCost k256x96{0.00, 1.135, 2.57, 0.48, 0.67, 0.040, 0.87};
  static constexpr TileCost k256x112{0.00, 1.257, 2.27, 1.38, 0.52, 0.040, 0.99};
  static constexpr TileCost k256x128{0.00, 1.402, 1.86, 1.77, 0.66, 0.061, 1.64};
  static constexpr TileCost k128x256{0.00, 1.409, 0.07, 3.02, 0.42, 0.046, 1.67};
  static constexpr TileCost k128x256Pairs{0.00, 1.429, 0.84, 2.82, 0.23, 0.086, 1.67};
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
