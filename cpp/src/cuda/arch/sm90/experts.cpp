// Plans of products over experts: pure host code, and the table that a plan selects from.
#include "cuda/arch/sm90/experts.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/integers.hpp"
#include "cuda/arch/sm80/plan.hpp"
#include "cuda/arch/sm90/strip_plan.hpp"
#include "cuda/arch/sm90/tile_plan.hpp"

namespace marlinq::cuda::sm90 {

extern const ExpertKernels kExperts_fp16_w4;
extern const ExpertKernels kExperts_fp16_w8;
extern const ExpertKernels kExperts_bf16_w4;
extern const ExpertKernels kExperts_bf16_w8;

const ExpertKernels& expert_kernels(FloatType type, std::int32_t code_bits) {
  if (type == FloatType::kF16) return code_bits == 4 ? kExperts_fp16_w4 : kExperts_fp16_w8;
  return code_bits == 4 ? kExperts_bf16_w4 : kExperts_bf16_w8;
}

namespace {

constexpr std::int32_t kFewRows = 16;  // tiles of fewer are for the strip kernel
// Of an expert on average, up to which that is so too where an expert may have several of them.
constexpr std::int64_t kStripRows = 6;

// Of an expert on average, for tiles of the first kernel, and from where on for the last. Rows are uneven: with the
// first number, most experts of a random routing have one tile.
constexpr std::int64_t kFirstRows = 24;
constexpr std::int64_t kLastRows = 180;

/// What the token tiles of an expert take, for each tile and for each row, but not less than one with few rows
/// (fitted on an H200; in any unit).
struct TokenTileCost {
  double tile, row, least;
};
constexpr TokenTileCost kSecondCost = {1.45, 0.0025, 1.45};
constexpr TokenTileCost kLastCost = {1.1, 0.0127, 1.9};

/// The same for all types and bits.
std::int32_t tile_tokens(std::size_t index) {
  return expert_kernels(FloatType::kF16, 4).tiles[index].tokens;
}

const ExpertKernels& kernels_of(const ExpertProblem& problem) {
  return expert_kernels(problem.matrix.x_type, problem.matrix.weight.code_bits);
}

/// As moe_align_block_size makes them: one tile after the other.
bool has_aligned_lists(const ExpertProblem& problem) {
  const TokenTileLists& tiles = problem.tiles;
  return problem.dispatches.empty() && tiles.topk.data == nullptr && tiles.first == nullptr;
}

/// Of an expert with so many rows on average, where routing is random, on average.
double expected_tiles(double rows, double tokens) {
  // Tile i + 1 is there if there are more than i * tokens rows; these are nearly normally distributed.
  const double deviation = std::sqrt(2 * rows);  // times the root of 2
  double tiles = 1;
  for (double filled = tokens; filled < rows + 4 * deviation; filled += tokens)
    tiles += 0.5 * std::erfc((filled + 0.5 - rows) / deviation);
  return tiles;
}

std::size_t instance_for(std::int64_t ids, std::int64_t experts) {
  if (ids <= kFirstRows * experts) return 0;
  if (ids > kLastRows * experts) return 2;
  const double rows = static_cast<double>(ids) / static_cast<double>(experts);
  const auto cost = [&](std::size_t index, const TokenTileCost& of) {
    return std::max(of.tile * expected_tiles(rows, tile_tokens(index)) + of.row * rows, of.least);
  };
  return cost(1, kSecondCost) <= cost(2, kLastCost) ? 1 : 2;
}

}  // namespace

bool may_join_tiles(const ExpertProblem& problem) {
  return has_aligned_lists(problem) && problem.tiles.tile_rows % kJoinedSlots == 0 &&
         problem.tiles.most_tiles <= kMostJoinedTiles;
}

ExpertPlan expert_tile_plan(std::size_t index, const ExpertProblem& problem,
                            const DeviceLimits& limits) {
  const WeightView& w = problem.matrix.weight;
  const ExpertInstance& kernel = kernels_of(problem).tiles[index];
  const std::int32_t stage = kernel.stage_bytes + stage_rest(w, kernel.blocks, kSlabChunks);
  const std::int32_t stages = std::max(limits.shared_bytes - kernel.other_bytes, 0) / stage;
  // Half of the slabs at most have a block of their own.
  const std::int64_t work = sm80::most_tiles(problem, kernel.tokens) *
                            ceil_div(w.n, kernel.blocks * sm80::Layout::kBlockFeatures) *
                            ceil_div(w.chunks, 2 * kSlabChunks);
  return {.instance = kFirstExpertTiles + static_cast<std::int32_t>(index),
          .tokens = kernel.tokens,
          .blocks =
              static_cast<std::int32_t>(std::clamp<std::int64_t>(work, 1, limits.multiprocessors)),
          .shared_bytes = stages >= 2 ? kernel.other_bytes + stages * stage : INT32_MAX,
          .may_cut = true,
          .stages = stages,
          .dependent_launch = true};
}

ExpertPlan expert_strip_plan(const ExpertProblem& problem, const DeviceLimits& limits) {
  const WeightView& w = problem.matrix.weight;
  const ExpertStripInstance& kernel = kernels_of(problem).strips;
  const std::int32_t stage =
      expert_stage_bytes(w, kernel.stage_bytes, kernel.item_chunks * sm80::Layout::kChunkSteps);
  const std::int32_t warp = kernel.stages * stage + kernel.part_bytes;
  const std::int32_t room =
      std::min(limits.shared_bytes,
               limits.multiprocessor_shared_bytes / kernel.blocks_together - sm80::kReservedShared);
  const std::int32_t warps = std::min((room - kernel.other_bytes) / warp, kernel.most_warps);
  // As many halves of units as there may be at most.
  const std::int64_t work = 2 * sm80::most_tiles(problem, kernel.tokens) *
                            ceil_div(w.n, sm80::Layout::kBlockFeatures) *
                            ceil_div(w.chunks, kernel.item_chunks);
  constexpr std::int32_t kLeastWarps = 4;  // fewer leave memory idle
  // The kernel counts in 32 bits.
  constexpr std::int64_t kMostWork = std::int64_t{1} << 30;
  return {.instance = kExpertStrips,
          .tokens = kernel.tokens,
          .blocks = static_cast<std::int32_t>(std::clamp<std::int64_t>(
              work, 1, std::int64_t{kernel.blocks_together} * limits.multiprocessors)),
          .shared_bytes = warps >= kLeastWarps && work < kMostWork
                              ? kernel.other_bytes + warps * warp
                              : INT32_MAX,
          .may_cut = true,
          .warps = warps,
          .dependent_launch = true};
}

namespace {

// With an activation, which takes codes of two places at a time, the older kernel is as quick, and so is it where
// experts have more than a few rows; where they have one, this one is some 10% quicker. After the older one down starts
// some 4 us earlier in the same kernel: the two run the same code. Where memory is slow the older one comes nearer to its
// rate, but for few ids.
bool takes_strips(const ExpertProblem& problem, const DeviceLimits& limits) {
  constexpr std::int64_t kMostIds = 3;  // of an expert on average
  const std::int32_t ids = problem.tiles.num_ids;
  return !problem.activates && problem.matrix.weight.step_shift >= 0 &&
         ids <= kMostIds * problem.num_experts &&
         (has_fast_memory(limits) || ids <= sm80::kMostSortedIds) &&
         expert_strip_plan(problem, limits).shared_bytes <= limits.shared_bytes;
}

}  // namespace

ExpertPlan plan_experts(const ExpertProblem& problem, const DeviceLimits& limits,
                        BatchInvariance invariance) {
  const WeightView& w = problem.matrix.weight;
  const std::int32_t rows = sm80::most_rows(problem);
  if (invariance == BatchInvariance::kRequired)
    return sm80::plan_experts(problem, limits, invariance);
  const TokenTileLists& tiles = problem.tiles;
  const bool has_tiles = tiles.topk.data == nullptr && sm90::has_tiles(w, problem.matrix.x_type) &&
                         (!problem.activates || w.n % (2 * sm80::Layout::kBlockFeatures) == 0);
  const bool many = has_aligned_lists(problem) &&
                    tiles.num_ids > std::max<std::int64_t>(kStripRows * problem.num_experts, rows);
  if (rows < kFewRows && !(many && has_tiles)) {
    return !problem.follows_product && takes_strips(problem, limits)
               ? expert_strip_plan(problem, limits)
               : sm80::plan_experts(problem, limits, invariance);
  }
  if (!has_tiles) return sm80::plan_experts(problem, limits, invariance);
  std::size_t index = 0;
  while (index + 1 < kExpertInstanceCount && tile_tokens(index) < rows) ++index;
  if (may_join_tiles(problem))
    index = std::max(index, instance_for(tiles.num_ids, problem.num_experts));
  const ExpertPlan plan = expert_tile_plan(index, problem, limits);
  return plan.shared_bytes <= limits.shared_bytes ? plan
                                                  : sm80::plan_experts(problem, limits, invariance);
}

std::int32_t tile_rows(std::int64_t tokens, std::int64_t ids, std::int64_t experts,
                       BatchInvariance invariance) {
  const std::int32_t rows = sm80::tile_rows(tokens, ids, experts, invariance);
  if (rows < kFewRows || invariance == BatchInvariance::kRequired) return rows;
  // An expert with more rows than a tile has another tile, which reads its weights again.
  return tile_tokens(instance_for(ids, experts));
}

std::int32_t most_sorted_ids(const ExpertProblem& problem, const DeviceLimits& limits,
                             BatchInvariance invariance) {
  const ExpertPlan plan = plan_experts(problem, limits, invariance);
  // An id a thread.
  return plan.instance == kExpertStrips ? std::min(sm80::kMostSortedIds, plan.warps * 32)
                                        : sm80::most_sorted_ids(problem, limits, invariance);
}

void launch_experts(const ExpertProblem& problem, const ExpertPlan& plan,
                    const DeviceLimits& limits, const SplitScratch& scratch, void* stream) {
  if (plan.instance < kFirstExpertTiles) {
    sm80::launch_experts(problem, plan, limits, scratch, stream);
    return;
  }
  const ExpertKernels& kernels = kernels_of(problem);
  const auto launch =
      plan.instance == kExpertStrips
          ? kernels.strips.launch
          : kernels.tiles[static_cast<std::size_t>(plan.instance - kFirstExpertTiles)].launch;
  launch(problem, plan, scratch, static_cast<cudaStream_t>(stream));
}

}  // namespace marlinq::cuda::sm90
