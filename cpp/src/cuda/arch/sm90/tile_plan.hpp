// What plans of the tile kernels of sm90 and their launches share: which layers they are for, their shared memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/arch/sm80/layout.hpp"
#include "cuda/problem.hpp"

namespace marlinq::cuda::sm90 {

constexpr std::int32_t kSlabChunks = 2;
constexpr std::int32_t kSlabStepShift = 3;
constexpr std::int32_t kSlabSteps = 1 << kSlabStepShift;
static_assert(kSlabSteps == kSlabChunks * sm80::Layout::kChunkSteps);

/// Groups of a slab, 1, 2 or 4.
constexpr std::int32_t slab_groups(const WeightView& w) noexcept {
  return kSlabSteps >> w.step_shift > 1 ? kSlabSteps >> w.step_shift : 1;
}

/// Groups of a stage of the ring, which holds a slab, or a chunk.
constexpr std::int32_t stage_groups(const WeightView& w, std::int32_t stage_chunks) noexcept {
  return std::max(slab_groups(w) * stage_chunks / kSlabChunks, 1);
}

/// Whether there are tiles for a layer: of groups of 32 rows or more, and of scales that may be divided. Where a slab has
/// several groups its codes are multiplied by them, which with float16 takes small ones of that type.
constexpr bool has_tiles(const WeightView& w, FloatType x_type) noexcept {
  constexpr std::int32_t kTileShift = 1;
  if (w.step_shift < kTileShift || !w.scales_divide) return false;
  return x_type != FloatType::kF16 || slab_groups(w) == 1 ||
         (w.scale_type == FloatType::kF16 && w.small_scales);
}

/// What there is beside the stages and outputs: a barrier.
constexpr std::int32_t kOtherTileBytes = 8;

/// What a stage takes beside x and codes: records and three barriers.
constexpr std::int32_t stage_rest(const WeightView& w, std::int32_t blocks,
                                  std::int32_t stage_chunks) noexcept {
  constexpr std::int32_t kBarrierBytes = 24;
  return blocks * stage_groups(w, stage_chunks) * sm80::Layout::kBlockStrips * w.record_bytes +
         kBarrierBytes;
}

}  // namespace marlinq::cuda::sm90
