// Launches one instantiation of a kernel.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "core/integers.hpp"
#include "cuda/arch/sm80/plan.hpp"
#include "cuda/arch/sm90/launch.hpp"
#include "cuda/arch/sm90/strip_kernel.cuh"
#include "cuda/arch/sm90/tile_kernel.cuh"
#include "cuda/launch.hpp"
#include "cuda/shared_memory.hpp"
#include "cuda/tensor_map.hpp"

namespace marlinq::cuda::sm90 {

inline TensorMap map_x(const GemmProblem& problem, int box_rows) {
  return tensor_map(problem.x, problem.x_type, problem.x_columns, problem.m, problem.x_stride,
                    box_rows);
}

inline TensorMap map_y(const GemmProblem& problem, int box_rows) {
  return tensor_map(problem.y, problem.y_type, problem.weight.n, problem.m, problem.y_stride,
                    box_rows);
}

template <class S>
void launch_strips(const GemmProblem& problem, const GemmPlan& plan, cudaStream_t stream) {
  static std::atomic<std::uint64_t> devices_done{0};
  allow_shared_memory(strip_gemm<S>, devices_done);
  const WeightView& w = problem.weight;
  const StripChoice choice{.clusters = plan.blocks / plan.cluster_blocks,
                           .cluster_blocks = plan.cluster_blocks,
                           .share_halves = plan.share_halves,
                           .warps = S::kWarps,
                           .item_chunks = S::kItemChunks,
                           .stages = plan.stages,
                           .streams_x = S::kStreamsX};
  const auto items = static_cast<int>(ceil_div(w.chunks, S::kItemChunks));
  const auto slice = static_cast<int>(ceil_div(items, plan.cluster_blocks));
  int part_shift = 0;
  while (S::kWarps << part_shift < slice) ++part_shift;
  const std::int32_t item_groups = groups_of_steps(w, S::kItemSteps);
  const int x_rows = std::min(problem.m, S::kTokens);
  launch_clusters(
      strip_gemm<S>, dim3(static_cast<unsigned>(plan.blocks)), plan.cluster_blocks, S::kThreads,
      plan.shared_bytes, plan.dependent_launch, stream,
      StripParams{.problem = problem,
                  .memory = strip_memory(problem, S::kTokens, S::kSlotBytes, choice),
                  .shares = EvenShare(strip_shares(w, choice), choice.clusters),
                  .share_halves = choice.share_halves,
                  .cluster_blocks = choice.cluster_blocks,
                  .stages = choice.stages,
                  .early_stages = plan.early_stages,
                  .items = items,
                  .part_shift = part_shift,
                  .item_groups = item_groups,
                  .item_record_bytes = item_groups * sm80::Layout::kBlockStrips * w.record_bytes,
                  .partial_item = w.chunks % S::kItemChunks != 0 || w.num_groups % item_groups != 0
                                      ? items - 1
                                      : -1,
                  .sub_steps = S::kItemSteps / item_groups,
                  .pairs = sm80::stores_together(problem, 2),
                  .x_map = S::kStreamsX ? map_x(problem, x_rows) : TensorMap{},
                  .x_box_bytes = x_rows * sm80::kXRowBytes});
}

/// A strip kernel of the shape StripShape<T, kBits, token tiles, streams x, warps>, in its forms.
template <class T, int kBits, int kTokenTiles, bool kStreamsX, int kWarps = 8>
constexpr Instance strip_instance() {
  using S = StripShape<T, kBits, kTokenTiles, kStreamsX, kWarps>;
  return {.kind = KernelKind::kStrip,
          .tokens = S::kTokens,
          .warps = S::kWarps,
          .streams_x = kStreamsX,
          .item_chunks = S::kItemChunks,
          .slot_bytes = S::kSlotBytes,
          .blocks_together = S::kBlocksTogether,
          .blocks = 0,
          .cluster_blocks = 0,
          .may_share_tile = false,
          .stage_chunks = 0,
          .stage_bytes = 0,
          .output_bytes = 0,
          .cost = {},
          .launch = [](const GemmProblem& problem, const GemmPlan& plan, const SplitScratch&,
                       cudaStream_t stream) {
            if constexpr (kBits == 4) {
              const auto launch = [&]<Records kRecords>() {
                const auto launch_groups = [&]<StripGroups kGroups>() {
                  launch_strips<
                      StripShape<T, kBits, kTokenTiles, kStreamsX, kWarps, kGroups, kRecords>>(
                      problem, plan, stream);
                };
                if (groups_of_steps(problem.weight, S::kItemSteps) == 1) {
                  launch_groups.template operator()<StripGroups::kLong>();
                } else {
                  launch_groups.template operator()<StripGroups::kShort>();
                }
              };
              switch (sm80::records_of(problem.weight)) {
                case Records::kHalfScales:
                  return launch.template operator()<Records::kHalfScales>();
                case Records::kHalfScalesAndZeros:
                  return launch.template operator()<Records::kHalfScalesAndZeros>();
                case Records::kAny:
                  break;
              }
            }
            launch_strips<S>(problem, plan, stream);
          }};
}

/// A tile kernel of the shape TileShape<T, kBits, warpgroups, packed blocks of each, tokens, blocks of a
/// cluster>.
template <class T, int kBits, int kGroups, int kGroupBlocks, int kTokens, int kClusterBlocks = 1>
constexpr Instance tile_instance(const TileCost& cost) {
  using S = TileShape<T, kBits, kGroups, kGroupBlocks, kTokens, kClusterBlocks>;
  return {.kind = KernelKind::kTile,
          .tokens = S::kTokens,
          .warps = S::kThreads / 32,
          .streams_x = true,
          .item_chunks = 0,
          .slot_bytes = 0,
          .blocks_together = 1,
          .blocks = S::kBlocks,
          .cluster_blocks = kClusterBlocks,
          .may_share_tile = S::kMayShareTile,
          .stage_chunks = S::kStageChunks,
          .stage_bytes = S::kStageBytes,
          .output_bytes = S::kOutputBytes,
          .cost = cost,
          .launch = [](const GemmProblem& problem, const GemmPlan& plan,
                       const SplitScratch& scratch, cudaStream_t stream) {
            static std::atomic<std::uint64_t> devices_done{0};
            allow_shared_memory(tile_gemm<S>, devices_done);
            const WeightView& w = problem.weight;
            const TileSchedule& schedule = plan.schedule;
            const auto slabs = static_cast<int>(ceil_div(w.chunks, kSlabChunks));
            const auto feature_tiles =
                static_cast<int>(ceil_div(w.n, S::kFeatures * kClusterBlocks));
            const auto token_tiles = static_cast<int>(ceil_div(problem.m, S::kTokens));
            const int last_band = token_tiles % schedule.token_band;
            const bool boxes = sm80::stores_together(problem, 8);
            const int x_rows = std::min(problem.m, S::kBoxTokens);
            launch_clusters(
                tile_gemm<S>, dim3(static_cast<unsigned>(plan.blocks)), plan.cluster_blocks,
                S::kThreads, plan.shared_bytes, plan.dependent_launch, stream,
                TileParams{
                    .x_map = map_x(problem, x_rows),
                    .y_map = boxes ? map_y(problem, S::kOutputTokens) : TensorMap{},
                    .problem = problem,
                    .scratch = scratch,
                    .schedule = schedule,
                    .tail = TileCuts(schedule.tail_tiles, slabs, schedule.tail_blocks),
                    .all_parts = feature_tiles * token_tiles * schedule.parts,
                    .parts = Divider(std::max(schedule.parts, 1)),
                    .part_slabs = EvenShare(slabs, std::max(schedule.parts, 1)),
                    .token_tiles = token_tiles,
                    .band = Divider(feature_tiles * schedule.token_band),
                    .band_widths = {Divider(schedule.token_band), Divider(std::max(last_band, 1))},
                    .stages = plan.stages,
                    .x_box_bytes = x_rows * sm80::kXRowBytes,
                    .slabs = slabs,
                    .slab_groups = slab_groups(w),
                    .stage_groups = stage_groups(w, S::kStageChunks),
                    .group_slabs =
                        slab_groups(w) > 1 ? 1 : 1 << std::min(w.step_shift - kSlabStepShift, 24),
                    .boxes = boxes});
          }};
}

}  // namespace marlinq::cuda::sm90
