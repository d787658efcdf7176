// Launches one instantiation of a kernel.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "cuda/arch/sm80/launch.hpp"
#include "cuda/arch/sm80/plan.hpp"
#include "cuda/arch/sm80/strip_kernel.cuh"
#include "cuda/arch/sm80/tile_kernel.cuh"
#include "cuda/launch.hpp"
#include "cuda/shared_memory.hpp"

namespace marlinq::cuda::sm80 {

template <class Params>
void launch_planned(void (*kernel)(Params), const Params& params, const GemmPlan& plan,
                    cudaStream_t stream) {
  launch_kernel(kernel, dim3(static_cast<unsigned>(plan.blocks)), plan.warps * 32,
                plan.shared_bytes, plan.dependent_launch, stream, params);
}

template <class S>
void launch_tiles(const GemmProblem& problem, const GemmPlan& plan, const SplitScratch& scratch,
                  cudaStream_t stream) {
  static std::atomic<std::uint64_t> devices_done{0};
  allow_shared_memory(tile_gemm<S>, devices_done);
  const WeightView& w = problem.weight;
  const TileSchedule& schedule = plan.schedule;
  const int feature_tiles = (w.n + S::kFeatures - 1) / S::kFeatures;
  const int token_tiles = (problem.m + S::kTokens - 1) / S::kTokens;
  const int last_band = token_tiles % schedule.token_band;
  launch_planned(
      tile_gemm<S>,
      TileParams{.problem = problem,
                 .scratch = scratch,
                 .schedule = schedule,
                 .tail = TileCuts(schedule.tail_tiles, w.chunks, schedule.tail_blocks),
                 .chunks = Divider(w.chunks),
                 .feature_tiles = feature_tiles,
                 .token_tiles = token_tiles,
                 .band = Divider(feature_tiles * schedule.token_band),
                 .band_widths = {Divider(schedule.token_band), Divider(std::max(last_band, 1))},
                 .slice_bytes = slice_bytes(w, S::kSliceBytes, S::kFeatures),
                 .pairs = stores_together(problem, 2)},
      plan, stream);
}

/// A tile kernel of the shape TileShape<T, kBits, feature warps, row warps, token tiles>.
template <class T, int kBits, int kFeatureWarps, int kRowWarps, int kTokenTiles>
constexpr Instance tile_instance(const TileCost& cost) {
  // Codes of bfloat16 take two instructions to multiply, which is no quicker than to multiply sums here.
  constexpr bool kCodes = std::is_same_v<T, __half>;
  // Where all registers are taken, a loop more would cost the others some.
  constexpr bool kApart = kFeatureWarps == 4 && kRowWarps == 1 && kTokenTiles == 8;
  constexpr auto kGroups = kCodes && !kApart ? TileGroups::kAnyOrCodes : TileGroups::kAny;
  using S = TileShape<T, kBits, kFeatureWarps, kRowWarps, kTokenTiles, false, kGroups>;
  return {.kind = KernelKind::kTile,
          .tokens = S::kTokens,
          .features = S::kFeatures,
          .row_warps = S::kRowWarps,
          .warps = S::kThreads / 32,
          .blocks_together = S::kBlocksTogether,
          .slice_bytes = S::kSliceBytes,
          .sum_bytes = S::kSumBytes,
          .sums_beside_ring = S::kExchanges,
          .stages = S::kStages,
          .cost = cost,
          .launch = [](const GemmProblem& problem, const GemmPlan& plan,
                       const SplitScratch& scratch, cudaStream_t stream) {
            if constexpr (kCodes && kApart) {
              if (has_short_groups(problem.weight)) {
                launch_tiles<TileShape<T, kBits, kFeatureWarps, kRowWarps, kTokenTiles, false,
                                       TileGroups::kShortCodes>>(problem, plan, scratch, stream);
                return;
              }
            }
            launch_tiles<S>(problem, plan, scratch, stream);
          }};
}

template <class S>
void launch_strips(const GemmProblem& problem, const GemmPlan& plan, cudaStream_t stream) {
  static std::atomic<std::uint64_t> devices_done{0};
  allow_shared_memory(strip_gemm<S>, devices_done);
  const WeightView& w = problem.weight;
  const EvenShare strips(strip_count(w), plan.blocks);
  launch_planned(strip_gemm<S>,
                 StripParams{.problem = problem,
                             .strips = strips,
                             .smaller = StripShare(strips.least, w.chunks, plan.warps),
                             .larger = StripShare(strips.least + 1, w.chunks, plan.warps),
                             .memory = strip_memory(w, strips, S::kXBytes)},
                 plan, stream);
}

/// A strip kernel of the shape StripShape<T, kBits, token tiles, most warps, promotes>, in its forms.
template <class T, int kBits, int kTokenTiles, int kMaxWarps, bool kPromotes>
constexpr Instance strip_instance() {
  using S = StripShape<T, kBits, kTokenTiles, kMaxWarps, kPromotes, GroupForm::kAny>;
  return {.kind = KernelKind::kStrip,
          .tokens = S::kTokens,
          .features = 0,
          .row_warps = 1,
          .warps = S::kMaxWarps,
          .blocks_together = 1,
          .slice_bytes = S::kXBytes,
          .sum_bytes = S::kSlotFloats * 4,
          .sums_beside_ring = true,
          .stages = S::kStages,
          .cost = {},
          .launch = [](const GemmProblem& problem, const GemmPlan& plan, const SplitScratch&,
                       cudaStream_t stream) {
            const auto launch = [&]<GroupForm kForm>() {
              launch_strips<StripShape<T, kBits, kTokenTiles, kMaxWarps, kPromotes, kForm>>(
                  problem, plan, stream);
            };
            using Short =
                StripShape<T, kBits, kTokenTiles, kMaxWarps, kPromotes, GroupForm::kShort>;
            switch (group_form(problem.weight, Short::kScalesCodes)) {
              case GroupForm::kShort:
                return launch.template operator()<GroupForm::kShort>();
              case GroupForm::kLong:
                return launch.template operator()<GroupForm::kLong>();
              case GroupForm::kPlainLong:
                return launch.template operator()<GroupForm::kPlainLong>();
              case GroupForm::kZerosLong:
                return launch.template operator()<GroupForm::kZerosLong>();
              case GroupForm::kAny:
                return launch.template operator()<GroupForm::kAny>();
            }
          }};
}

}  // namespace marlinq::cuda::sm80
