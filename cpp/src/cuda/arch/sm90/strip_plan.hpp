// The strip kernel of sm90: how its work is divided, and where what lies in shared memory; the same for
// a plan and for its launch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/integers.hpp"
#include "cuda/arch/sm80/layout.hpp"
#include "cuda/problem.hpp"

namespace marlinq::cuda::sm90 {

/// As that of an H200, which the instructions beside the bytes hold back; with that of an H100 bytes are the bound.
constexpr bool has_fast_memory(const DeviceLimits& limits) noexcept {
  constexpr std::int32_t kRate = 4000;  // GB/s
  return limits.memory_rate >= kRate;
}

using sm80::Layout;

/// Groups that `steps` packed steps have at most, where all groups have as many steps, a power of two.
inline std::int32_t groups_of_steps(const WeightView& w, std::int32_t steps) {
  return std::max(w.step_shift < 8 ? steps >> w.step_shift : 1, 1);
}

/// A stage of the strip kernel over experts: `bytes` and the records of an item of so many steps.
inline std::int32_t expert_stage_bytes(const WeightView& w, std::int32_t bytes,
                                       std::int32_t steps) {
  return bytes + groups_of_steps(w, steps) * Layout::kBlockStrips * w.record_bytes;
}

/// What a plan may choose.
struct StripChoice {
  std::int32_t clusters = 1;
  std::int32_t cluster_blocks = 1;  // 1 or 2, which share K
  std::int32_t share_halves = 1;    // features are shared out by halves of packed blocks, or by 2
  std::int32_t warps = 8;
  std::int32_t item_chunks = 2;
  std::int32_t stages = 2;        // of the ring of each warp, ...
  std::int32_t early_stages = 2;  // ... and those filled before the kernel before has ended
  bool streams_x = false;         // x comes with the codes, else it is there as a whole
};

/// What is divided over the clusters.
inline std::int32_t strip_shares(const WeightView& w, const StripChoice& choice) {
  return static_cast<std::int32_t>(ceil_div(w.n, Layout::kBlockFeatures) * 2 / choice.share_halves);
}

struct StripMemory {
  std::int32_t record_bytes = 0;  // of an item: those of all its groups
  std::int32_t stage_bytes = 0;   // codes, and x if it is streamed: multiples of 1 KB each
  std::int32_t records_place = 0;
  std::int32_t x_pitch = 0;  // from one row of x to the next
  std::int32_t x_place = 0;
  std::int32_t slots_place = 0;
  std::int32_t receive_place = 0;
  std::int32_t barriers_place = 0;
  std::int32_t contributors_place = 0;
  std::int64_t bytes = 0;
};

inline StripMemory strip_memory(const GemmProblem& problem, std::int32_t tokens,
                                std::int32_t slot_bytes, const StripChoice& choice) {
  const WeightView& w = problem.weight;
  const std::int64_t items = ceil_div(w.chunks, choice.item_chunks);
  const std::int64_t slice = ceil_div(items, choice.cluster_blocks);
  const std::int64_t row_bytes = slice * choice.item_chunks * Layout::kChunkRows * 2;
  const std::int64_t halves =
      ceil_div(strip_shares(w, choice), choice.clusters) * choice.share_halves;
  // At most: a run of single halves may begin inside a block.
  const std::int64_t segments = choice.share_halves == 2 ? halves / 2 : halves / 2 + 1;
  const std::int64_t groups = groups_of_steps(w, choice.item_chunks * Layout::kChunkSteps);
  const std::int64_t codes =
      std::int64_t{choice.item_chunks} * Layout::kBlockStrips * 128 * w.code_bits;
  constexpr std::int64_t kXPadding = 16;  // spreads the rows of an ldmatrix over all banks
  const auto narrow = [](std::int64_t bytes) {
    return static_cast<std::int32_t>(std::min<std::int64_t>(bytes, INT32_MAX));
  };
  StripMemory memory;
  memory.record_bytes = narrow(groups * Layout::kBlockStrips * w.record_bytes);
  memory.x_pitch = narrow(row_bytes + kXPadding);
  memory.stage_bytes =
      narrow(codes + (choice.streams_x ? std::int64_t{choice.item_chunks} * tokens * 128 : 0));
  std::int64_t place = std::int64_t{choice.warps} * choice.stages * memory.stage_bytes;
  const auto reserve = [&](std::int64_t bytes) {
    const std::int64_t at = place;
    place += round_up(bytes, 16);
    return narrow(at);
  };
  memory.records_place = reserve(std::int64_t{choice.warps} * choice.stages * memory.record_bytes);
  memory.x_place = reserve(choice.streams_x ? 0 : std::int64_t{problem.m} * memory.x_pitch);
  memory.slots_place = reserve((segments - 1) * slot_bytes);
  const std::int64_t received = segments * (tokens / 8) * ceil_div(std::min(problem.m, 8), 2);
  memory.receive_place =
      reserve(choice.cluster_blocks == 2 ? received * Layout::kBlockFeatures * 4 : 0);
  memory.barriers_place = reserve((choice.warps * (choice.stages + 1) + 1) * 8);
  memory.contributors_place = reserve(segments * 4);
  memory.bytes = place;
  return memory;
}

}  // namespace marlinq::cuda::sm90
