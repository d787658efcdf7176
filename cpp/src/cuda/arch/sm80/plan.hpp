// How much shared memory the kernels need, the same for a plan and for its launch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/integers.hpp"
#include "cuda/arch/sm80/layout.hpp"
#include "cuda/problem.hpp"

namespace marlinq::cuda::sm80 {

// Slices and stages start where the swizzle of x expects it.
constexpr std::int64_t kStageAlignment = 128;

/// A slice of a tile kernel: x and codes, and the records of each block of features.
inline std::int32_t slice_bytes(const WeightView& w, std::int32_t without_records,
                                std::int32_t features) {
  const std::int64_t records = std::int64_t{features / Layout::kStripFeatures} *
                               w.groups_per_chunk * w.record_bytes;
  return static_cast<std::int32_t>(round_up(without_records + records, kStageAlignment));
}

inline std::int32_t strip_count(const WeightView& w) {
  return static_cast<std::int32_t>(ceil_div(w.n, Layout::kStripFeatures));
}

/// The most strips of a strip group, and the most strip groups of a block, when `blocks` blocks share
/// all strips.
struct StripWidths {
  std::int32_t strips = 1;
  std::int32_t groups = 1;
};

inline StripWidths strip_widths(const WeightView& w, std::int32_t blocks) {
  const std::int32_t strips = strip_count(w);
  StripWidths widths;
  for (const std::int32_t share :
       {strips / blocks, static_cast<std::int32_t>(ceil_div(strips, blocks))}) {
    if (share == 0) continue;
    const auto groups = static_cast<std::int32_t>(ceil_div(share, Layout::kBlockStrips));
    widths.groups = std::max(widths.groups, groups);
    widths.strips =
        std::max(widths.strips, static_cast<std::int32_t>(ceil_div(share, groups)));
  }
  return widths;
}

/// A stage of a warp of a strip kernel: x, codes and records of a strip group's chunk.
inline std::int32_t strip_stage_bytes(const WeightView& w, std::int32_t x_bytes,
                                      std::int32_t strips) {
  constexpr std::int32_t kPieceBytes = 512;
  const std::int64_t strip = w.code_bits / 4 * kPieceBytes + w.groups_per_chunk * w.record_bytes;
  return static_cast<std::int32_t>(round_up(x_bytes + strips * strip, kStageAlignment));
}

}  // namespace marlinq::cuda::sm80
