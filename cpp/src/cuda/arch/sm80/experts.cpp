// Plans of products over experts: pure host code, and the table that a plan selects from.
#include "cuda/arch/sm80/experts.hpp"

#include <algorithm>
#include <array>
#include <cstdint>

#include "core/integers.hpp"
#include "cuda/arch/sm80/plan.hpp"

namespace marlinq::cuda::sm80 {

extern const std::array<ExpertInstance, kExpertInstanceCount> kExperts_fp16_w4;
extern const std::array<ExpertInstance, kExpertInstanceCount> kExperts_fp16_w8;
extern const std::array<ExpertInstance, kExpertInstanceCount> kExperts_bf16_w4;
extern const std::array<ExpertInstance, kExpertInstanceCount> kExperts_bf16_w8;

std::span<const ExpertInstance> expert_instances(FloatType type, std::int32_t code_bits) {
  if (type == FloatType::kF16) return code_bits == 4 ? kExperts_fp16_w4 : kExperts_fp16_w8;
  return code_bits == 4 ? kExperts_bf16_w4 : kExperts_bf16_w8;
}

std::int64_t most_tiles(const ExpertProblem& problem, std::int32_t tokens) {
  if (problem.dispatches.empty()) {
    return std::int64_t{std::min(problem.tiles.most_tiles, problem.tiles.num_ids)} *
           ceil_div(problem.tiles.tile_rows, tokens);
  }
  std::int64_t tiles = 0;
  for (const ExpertRows& rows : problem.dispatches) tiles += ceil_div(rows.rows, tokens);
  return tiles;
}

std::int32_t most_rows(const ExpertProblem& problem) {
  std::int32_t most = problem.tiles.tile_rows;
  for (const ExpertRows& rows : problem.dispatches) most = std::max(most, rows.rows);
  return most;
}

namespace {

std::int32_t shared_bytes(const WeightView& w, const ExpertInstance& kernel) {
  const std::int64_t ring = std::int64_t{kernel.stages} * kernel.row_warps *
                            slice_bytes(w, kernel.slice_bytes, kernel.features);
  return static_cast<std::int32_t>(std::min<std::int64_t>(ring + kernel.table_bytes, INT32_MAX));
}

bool fits(const WeightView& w, const ExpertInstance& kernel, const DeviceLimits& limits) {
  return shared_bytes(w, kernel) <= limits.shared_bytes - kExpertStaticShared;
}

constexpr std::size_t kStrips = 0;

}  // namespace

ExpertPlan plan_experts(const ExpertProblem& problem, const DeviceLimits& limits,
                        BatchInvariance invariance) {
  const WeightView& w = problem.matrix.weight;
  const std::span<const ExpertInstance> all = expert_instances(problem.matrix.x_type, w.code_bits);
  const bool invariant = invariance == BatchInvariance::kRequired;
  constexpr std::size_t kAnyScales = 1;
  constexpr std::size_t kAnyBatch = 2;
  // The first that holds a whole tile of rows.
  std::size_t chosen = kAnyScales;
  if (w.scales_divide) {
    const std::size_t least = invariant ? kAnyBatch : kAnyScales;
    chosen = least;
    while (chosen + 1 < all.size() && all[chosen].tokens < most_rows(problem)) ++chosen;
    while (chosen > least && !fits(w, all[chosen], limits)) --chosen;
  }
  // How this one divides K depends on the batch. Where blocks have long runs the other is quicker, whose
  // warps share x, but not where this has a kernel of its own for the groups and a list is no more than a tile of it.
  constexpr std::int64_t kMostChunks = 1500;
  constexpr std::int64_t kMostWork = std::int64_t{1} << 30;  // that the kernel counts
  const std::int64_t work =
      most_tiles(problem, all[kStrips].tokens) * ceil_div(w.n, all[kStrips].features) * w.chunks;
  const std::int64_t most_work =
      most_rows(problem) <= all[kStrips].tokens && (has_even_short_groups(w) || w.chunk_shift >= 0)
          ? kMostWork
          : kMostChunks * all[kStrips].blocks_together * limits.multiprocessors;
  const bool may_use_strips = !invariant && fits(w, all[kStrips], limits);
  if (problem.tiles.topk.data != nullptr ||
      (may_use_strips && chosen == kAnyScales && work <= most_work)) {
    chosen = kStrips;
  }
  return plan_experts_with(chosen, problem, limits, invariance);
}

ExpertPlan plan_experts_with(std::size_t instance, const ExpertProblem& problem,
                             const DeviceLimits& limits, BatchInvariance invariance) {
  const WeightView& w = problem.matrix.weight;
  const ExpertInstance& kernel = expert_instances(problem.matrix.x_type, w.code_bits)[instance];
  const std::int32_t shared = shared_bytes(w, kernel);
  const std::int32_t fit = limits.multiprocessor_shared_bytes / (shared + kReservedShared);
  const std::int32_t together = std::clamp(fit, 1, kernel.blocks_together);
  // Every chunk can have a block of its own at most.
  const std::int64_t units = most_tiles(problem, kernel.tokens) * ceil_div(w.n, kernel.features);
  const std::int64_t work = units * w.chunks;
  const std::int64_t blocks = std::int64_t{together} * limits.multiprocessors;
  // Strips that may be cut are another kernel for plain long groups, which takes a little longer: for few units, and for long ones,
  // of which some blocks could have one more than others.
  constexpr std::int64_t kLongUnit = 64;
  const bool pays = instance != kStrips || w.chunks >= kLongUnit || units * 2 <= blocks;
  return {.instance = static_cast<std::int32_t>(instance),
          .tokens = kernel.tokens,
          .blocks = static_cast<std::int32_t>(std::clamp<std::int64_t>(work, 1, blocks)),
          .shared_bytes = shared,
          .may_cut = pays && invariance != BatchInvariance::kRequired,
          .dependent_launch = limits.capability >= 90};
}

// Tiles of 8 rows have a kernel that comes nearest to the rate of memory. Larger ones multiply as many of their
// token tiles as have rows, so that they cost little where experts have few, and save much where a few experts
// have most of them.
std::int32_t tile_rows(std::int64_t tokens, std::int64_t ids, std::int64_t experts,
                       BatchInvariance /*invariance*/) {
  if (tokens <= 8 || ids <= 6 * experts) return 8;
  if (tokens <= 16) return 16;
  // The kernel of 64 rows has half of the warps: it pays where most experts fill a tile.
  return ids < 48 * experts ? 32 : 64;
}

std::int32_t most_sorted_ids(const ExpertProblem& problem, const DeviceLimits& limits,
                             BatchInvariance invariance) {
  const bool strips = plan_experts(problem, limits, invariance).instance == kStrips;
  return strips ? kMostSortedIds : 0;
}

void launch_experts(const ExpertProblem& problem, const ExpertPlan& plan,
                    const DeviceLimits& limits, const SplitScratch& scratch, void* stream) {
  expert_instances(problem.matrix.x_type,
                   problem.matrix.weight.code_bits)[static_cast<std::size_t>(plan.instance)]
      .launch(problem, plan, limits, scratch, static_cast<cudaStream_t>(stream));
}

}  // namespace marlinq::cuda::sm80
