// What plans and launches share: how much shared memory the kernels need, how outputs may be stored.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/integers.hpp"
#include "cuda/arch/sm80/layout.hpp"
#include "cuda/arch/sm80/share.hpp"
#include "cuda/problem.hpp"

namespace marlinq::cuda::sm80 {

// Slices start where the swizzle of x expects it; stages of strips do by their own size.
constexpr std::int64_t kSliceAlignment = 128;

// What the system keeps of each block on a multiprocessor.
constexpr std::int32_t kReservedShared = 1024;

/// What the kernels over experts have of static shared memory, at most; the others have none.
constexpr std::int32_t kExpertStaticShared = 512;

/// Where every chunk has as many groups, several, and their records are 16 bytes for each lane at most.
MARLINQ_HOST_DEVICE inline bool has_even_short_groups(const WeightView& w) {
  return w.chunk_shift < 0 && w.step_shift >= 0 &&
         w.groups_per_chunk * Layout::kBlockStrips * w.record_bytes <= Layout::kLanes * 16;
}

/// The same, of float16 scales that codes can be multiplied by, and of so many rows that the roundings of their weights
/// average out in every output.
MARLINQ_HOST_DEVICE inline bool has_short_groups(const WeightView& w) {
  constexpr std::int32_t kLeastChunks = 4;
  return has_even_short_groups(w) && w.scale_type == FloatType::kF16 && w.small_scales &&
         w.chunks >= kLeastChunks;
}

/// What the records of groups hold, where a kernel is for one kind: to take the values of a group needs no branch then.
enum class Records {
  kAny,
  kHalfScales,          // of float16, and no zero points
  kHalfScalesAndZeros,  // of float16, and zero points
};

MARLINQ_HOST_DEVICE inline Records records_of(const WeightView& w) {
  if (w.scale_type != FloatType::kF16) return Records::kAny;
  return w.has_zeros ? Records::kHalfScalesAndZeros : Records::kHalfScales;
}

/// What groups a kernel or a loop of it is for. What it need not look up or ask takes no instructions, and no registers.
enum class GroupForm {
  kAny,        // looked up, they may start anywhere
  kShort,      // has_even_short_groups()
  kLong,       // of whole chunks each (WeightView::chunk_shift)
  kPlainLong,  // the same, Records::kHalfScales
  kZerosLong,  // the same, Records::kHalfScalesAndZeros
};

constexpr Records records_of(GroupForm form) {
  return form == GroupForm::kPlainLong   ? Records::kHalfScales
         : form == GroupForm::kZerosLong ? Records::kHalfScalesAndZeros
                                         : Records::kAny;
}
constexpr bool has_long_groups(GroupForm form) {
  return form == GroupForm::kLong || records_of(form) != Records::kAny;
}

/// Of the groups of a weight. scales_codes: short ones are those whose scales codes are multiplied by.
inline GroupForm group_form(const WeightView& w, bool scales_codes) {
  if (w.chunk_shift < 0) {
    const bool is_short = scales_codes ? has_short_groups(w) : has_even_short_groups(w);
    return is_short ? GroupForm::kShort : GroupForm::kAny;
  }
  switch (records_of(w)) {
    case Records::kHalfScales:
      return GroupForm::kPlainLong;
    case Records::kHalfScalesAndZeros:
      return GroupForm::kZerosLong;
    case Records::kAny:
      break;
  }
  return GroupForm::kLong;
}

/// A slice of a tile kernel: x and codes, and the records of each block of features.
inline std::int32_t slice_bytes(const WeightView& w, std::int32_t without_records,
                                std::int32_t features) {
  const std::int64_t records =
      std::int64_t{features / Layout::kStripFeatures} * w.groups_per_chunk * w.record_bytes;
  return static_cast<std::int32_t>(round_up(without_records + records, kSliceAlignment));
}

/// The ways to share out the `left` tiles of a tail that costs are fitted to, with at most `most` blocks: f(share, blocks),
/// where share is Schedule::share.
template <class F>
void each_share(std::int64_t left, std::int64_t most, F&& f) {
  for (const std::int32_t share : {1, 2, 3, 4, 8, 0}) {
    const std::int64_t blocks = share == 0 ? most : left * share;
    if (share == 1 || (blocks <= most && blocks > left))
      f(share, static_cast<std::int32_t>(blocks));
  }
}

/// The blocks of a share, also where its tiles are too few or too many for it.
inline std::int32_t blocks_of_share(std::int32_t share, std::int64_t left, std::int64_t most) {
  const std::int64_t wanted = share == 0 ? most : left * share;
  return static_cast<std::int32_t>(std::max(std::min(wanted, most), left));
}

/// Whether `elements` outputs in a row may be stored at once, of whatever rows where m is not 1.
inline bool stores_together(const GemmProblem& problem, std::int32_t elements) {
  return problem.y_type == problem.x_type && problem.weight.n % elements == 0 &&
         reinterpret_cast<std::uintptr_t>(problem.y) % (2 * elements) == 0 &&
         (problem.m == 1 || problem.y_stride % elements == 0);
}

inline std::int32_t strip_count(const WeightView& w) {
  return static_cast<std::int32_t>(ceil_div(w.n, Layout::kStripFeatures));
}

/// The shared memory of a strip kernel: a ring of stages for each warp, and another for their group
/// records, whose size would take x out of its alignment.
struct StripMemory {
  std::int32_t stage_bytes = 0;   // x and codes
  std::int32_t record_bytes = 0;  // of a stage
};

inline StripMemory strip_memory(const WeightView& w, const EvenShare& strips,
                                std::int32_t x_bytes) {
  constexpr std::int32_t kPieceBytes = 512;
  const std::int32_t most = strips.least + (strips.rest > 0 ? 1 : 0);
  return {.stage_bytes = x_bytes + std::min<std::int32_t>(most, Layout::kBlockStrips) *
                                       (w.code_bits / 4) * kPieceBytes,
          .record_bytes = Layout::kBlockStrips * w.groups_per_chunk * w.record_bytes};
}

}  // namespace marlinq::cuda::sm80
