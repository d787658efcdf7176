// Launches one instantiation of the kernel over experts.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "core/integers.hpp"
#include "cuda/arch/sm80/expert_rows.cuh"
#include "cuda/arch/sm80/plan.hpp"
#include "cuda/arch/sm90/expert_strip_kernel.cuh"
#include "cuda/arch/sm90/expert_tile_kernel.cuh"
#include "cuda/arch/sm90/experts.hpp"
#include "cuda/arch/sm90/strip_plan.hpp"
#include "cuda/launch.hpp"
#include "cuda/shared_memory.hpp"

namespace marlinq::cuda::sm90 {

template <class S, class Rows>
void launch_expert_tiles(const ExpertProblem& problem, const ExpertPlan& plan,
                         const SplitScratch& scratch, const ExpertTileCost& cost, const Rows& rows,
                         cudaStream_t stream) {
  static std::atomic<std::uint64_t> devices_done{0};
  allow_shared_memory(expert_tiles<S, Rows>, devices_done);
  const GemmProblem& matrix = problem.matrix;
  const WeightView& w = matrix.weight;
  launch_kernel(
      expert_tiles<S, Rows>, dim3(static_cast<unsigned>(plan.blocks)), S::kThreads,
      plan.shared_bytes, plan.dependent_launch, stream,
      ExpertTileParams<Rows>{
          .problem = matrix,
          .scratch = scratch,
          .rows = rows,
          .expert_bytes = problem.expert_bytes,
          .num_experts = problem.num_experts,
          .feature_tiles = Divider(static_cast<std::int32_t>(ceil_div(w.n, S::kFeatures))),
          .blocks = Divider(plan.blocks),
          .cost = cost,
          .weights = problem.weights,
          .weights_bias = problem.weights_bias,
          .activates = problem.activates,
          .activation = problem.activation,
          .may_cut = plan.may_cut,
          .joins = S::kTokens > problem.tiles.tile_rows && may_join_tiles(problem),
          .settled = !problem.dispatches.empty() || problem.tiles.settled,
          .rows_together = sm80::stores_together(matrix, 8),
          .share = plan.share,
          .stages = plan.stages,
          .slabs = static_cast<int>(ceil_div(w.chunks, kSlabChunks)),
          .slab_groups = slab_groups(w),
          .group_slabs =
              slab_groups(w) > 1 ? 1 : 1 << std::min(w.step_shift - kSlabStepShift, 24)});
}

/// A kernel of the shape ExpertShape<T, kBits, groups, tokens>.
template <class T, int kBits, int kGroups, int kTokens>
constexpr ExpertInstance expert_tile_instance() {
  using S = ExpertShape<T, kBits, kGroups, kTokens>;
  return {.tokens = S::kTokens,
          .blocks = S::kBlocks,
          .stage_bytes = S::kStageBytes,
          .other_bytes = ExpertRing<S>::kOtherBytes,
          .launch = [](const ExpertProblem& problem, const ExpertPlan& plan,
                       const SplitScratch& scratch, cudaStream_t stream) {
            constexpr ExpertTileCost kCost =
                kTokens == 32   ? ExpertTileCost{1.15F, 1.5F, 0.28F, 0.032F, 1.0F}
                : kTokens == 80 ? ExpertTileCost{1.25F, 1.5F, 0.4F, 0.032F, 3.0F}
                                : ExpertTileCost{1.7F, 3.0F, 0.77F, 0.037F, 2.0F};
            if (problem.dispatches.empty()) {
              launch_expert_tiles<S>(problem, plan, scratch, kCost,
                                     sm80::listed_tiles(problem, S::kTokens), stream);
            } else {
              launch_expert_tiles<S>(problem, plan, scratch, kCost,
                                     sm80::dispatched_tiles(problem, S::kTokens), stream);
            }
          }};
}

template <class S, class Rows>
void launch_expert_strips(const ExpertProblem& problem, const ExpertPlan& plan,
                          const SplitScratch& scratch, const Rows& rows, cudaStream_t stream) {
  static std::atomic<std::uint64_t> devices_done{0};
  allow_shared_memory(expert_strips<S, Rows>, devices_done);
  const GemmProblem& matrix = problem.matrix;
  const WeightView& w = matrix.weight;
  const std::int32_t groups = groups_of_steps(w, S::kItemSteps);
  const auto items = static_cast<std::int32_t>(ceil_div(w.chunks, S::kItemChunks));
  launch_kernel(expert_strips<S, Rows>, dim3(static_cast<unsigned>(plan.blocks)), plan.warps * 32,
                plan.shared_bytes, plan.dependent_launch, stream,
                ExpertStripParams<Rows>{
                    .problem = matrix,
                    .scratch = scratch,
                    .rows = rows,
                    .expert_bytes = problem.expert_bytes,
                    .num_experts = problem.num_experts,
                    .feature_tiles =
                        Divider(static_cast<std::int32_t>(ceil_div(w.n, Layout::kBlockFeatures))),
                    .blocks = Divider(plan.blocks),
                    .warps = Divider(plan.warps),
                    .items = Divider(items),
                    .hand_over = 13,
                    .stage_bytes = expert_stage_bytes(w, S::kRecordsPlace, S::kItemSteps),
                    .item_groups = groups,
                    .sub_steps = S::kItemSteps / groups,
                    .least_items = Divider(std::max(plan.warps, items / kMostStripBlocks)),
                    .weights = problem.weights,
                    .weights_bias = problem.weights_bias,
                    .may_cut = plan.may_cut,
                    .share = plan.share,
                    .settled = !problem.dispatches.empty() || problem.tiles.settled,
                    .pairs = sm80::stores_together(matrix, 2)});
}

template <class T, int kBits>
constexpr ExpertStripInstance expert_strip_instance() {
  using S = ExpertStripShape<T, kBits>;
  static_assert(sizeof(ExpertStripTables<S, sm80::SortedTiles>) <=
                sizeof(ExpertStripTables<S, sm80::ListedTiles>));
  return {.tokens = S::kTokens,
          .item_chunks = S::kItemChunks,
          .stages = S::kStages,
          .stage_bytes = S::kRecordsPlace,
          .part_bytes = S::kPartBytes,
          .other_bytes = sizeof(ExpertStripTables<S, sm80::ListedTiles>),
          .most_warps = S::kMostWarps,
          .blocks_together = S::kBlocksTogether,
          .launch = [](const ExpertProblem& problem, const ExpertPlan& plan,
                       const SplitScratch& scratch, cudaStream_t stream) {
            if (problem.tiles.topk.data != nullptr) {
              launch_expert_strips<S>(problem, plan, scratch, sm80::sorted_tiles(problem), stream);
            } else if (problem.dispatches.empty()) {
              launch_expert_strips<S>(problem, plan, scratch,
                                      sm80::listed_tiles(problem, S::kTokens), stream);
            } else {
              launch_expert_strips<S>(problem, plan, scratch,
                                      sm80::dispatched_tiles(problem, S::kTokens), stream);
            }
          }};
}

template <class T, int kBits>
constexpr ExpertKernels make_expert_kernels() {
  return {
      .strips = expert_strip_instance<T, kBits>(),
      .tiles = {expert_tile_instance<T, kBits, 4, 32>(), expert_tile_instance<T, kBits, 3, 80>(),
                expert_tile_instance<T, kBits, 2, 144>()}};
}

}  // namespace marlinq::cuda::sm90
