// Launches one instantiation of the kernel over experts.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "core/integers.hpp"
#include "cuda/arch/sm80/expert_kernel.cuh"
#include "cuda/arch/sm80/expert_rows.cuh"
#include "cuda/arch/sm80/expert_strip_kernel.cuh"
#include "cuda/arch/sm80/experts.hpp"
#include "cuda/arch/sm80/plan.hpp"
#include "cuda/launch.hpp"
#include "cuda/shared_memory.hpp"

namespace marlinq::cuda::sm80 {

template <class S, class Rows, void (*kKernel)(ExpertParams<Rows>)>
void launch_expert_kernel(const ExpertProblem& problem, const ExpertPlan& plan,
                          const DeviceLimits& limits, const SplitScratch& scratch,
                          const ExpertCost& cost, const Rows& rows, cudaStream_t stream) {
  static std::atomic<std::uint64_t> devices_done{0};
  allow_shared_memory(kKernel, devices_done);
  const GemmProblem& matrix = problem.matrix;
  const WeightView& w = matrix.weight;
  launch_kernel(kKernel, dim3(static_cast<unsigned>(plan.blocks)), S::kThreads, plan.shared_bytes,
                plan.dependent_launch, stream,
                ExpertParams<Rows>{.problem = matrix,
                                   .scratch = scratch,
                                   .rows = rows,
                                   .expert_bytes = problem.expert_bytes,
                                   .num_experts = problem.num_experts,
                                   .chunks = Divider(w.chunks),
                                   .feature_tiles = Divider(
                                       static_cast<std::int32_t>(ceil_div(w.n, S::kFeatures))),
                                   .blocks = Divider(plan.blocks),
                                   .cost = cost,
                                   .multiprocessors = limits.multiprocessors,
                                   .slice_bytes = slice_bytes(w, S::kSliceBytes, S::kFeatures),
                                   .weights = problem.weights,
                                   .weights_bias = problem.weights_bias,
                                   .activates = problem.activates,
                                   .activation = problem.activation,
                                   .may_cut = plan.may_cut,
                                   .share = plan.share,
                                   .settled = !problem.dispatches.empty() || problem.tiles.settled,
                                   .pairs = stores_together(matrix, 2)});
}

template <class S>
constexpr ExpertInstance instance_of(std::size_t table_bytes,
                                     decltype(ExpertInstance::launch) launch) {
  return {.tokens = S::kTokens,
          .features = S::kFeatures,
          .row_warps = S::kRowWarps,
          .blocks_together = S::kBlocksTogether,
          .slice_bytes = S::kSliceBytes,
          .stages = S::kStages,
          .table_bytes = static_cast<std::int32_t>(table_bytes),
          .launch = launch};
}

/// kCuts: as expert_strips, but dispatches take the kernel that may cut, whatever the plan says.
template <class S, bool kCuts>
void launch_expert_strips(const ExpertProblem& problem, const ExpertPlan& plan,
                          const DeviceLimits& limits, const SplitScratch& scratch,
                          cudaStream_t stream) {
  if (problem.tiles.topk.data != nullptr) {
    launch_expert_kernel<S, SortedTiles, expert_strips<S, SortedTiles, kCuts>>(
        problem, plan, limits, scratch, {}, sorted_tiles(problem), stream);
  } else if (problem.dispatches.empty()) {
    launch_expert_kernel<S, ListedTiles, expert_strips<S, ListedTiles, kCuts>>(
        problem, plan, limits, scratch, {}, listed_tiles(problem, S::kTokens), stream);
  } else {
    launch_expert_kernel<S, DispatchedTiles, expert_strips<S, DispatchedTiles, true>>(
        problem, plan, limits, scratch, {}, dispatched_tiles(problem, S::kTokens), stream);
  }
}

/// The kernel for tiles of a few rows.
template <class T, int kBits>
constexpr ExpertInstance expert_strip_instance() {
  constexpr int kWarps = 8;
  constexpr int kStages = kBits == 4 ? 3 : 2;
  using Any = ExpertStripShape<T, kBits, kWarps, kStages, TileGroups::kLookedUp>;
  return instance_of<Any>(
      sizeof(StripTables<Any>),
      [](const ExpertProblem& problem, const ExpertPlan& plan, const DeviceLimits& limits,
         const SplitScratch& scratch, cudaStream_t stream) {
        using Plain = ExpertStripShape<T, kBits, kWarps, kStages, TileGroups::kPlainLong>;
        using Long = ExpertStripShape<T, kBits, kWarps, kStages, TileGroups::kLong>;
        using Short = ExpertStripShape<T, kBits, kWarps, kStages, TileGroups::kShortSums>;
        auto* launch = launch_expert_strips<Any, true>;
        switch (group_form(problem.matrix.weight, false)) {
          case GroupForm::kPlainLong:
            launch = plan.may_cut ? launch_expert_strips<Plain, true>
                                  : launch_expert_strips<Plain, false>;
            break;
          case GroupForm::kZerosLong:
          case GroupForm::kLong:
            launch = launch_expert_strips<Long, true>;
            break;
          case GroupForm::kShort:
            launch = launch_expert_strips<Short, true>;
            break;
          case GroupForm::kAny:
            break;
        }
        launch(problem, plan, limits, scratch, stream);
      });
}

/// A kernel of the shape TileShape<T, kBits, 4, 1, kTokenTiles, kPromotes>.
template <class T, int kBits, int kTokenTiles, bool kPromotes>
constexpr ExpertInstance expert_instance() {
  using S = TileShape<T, kBits, 4, 1, kTokenTiles, kPromotes>;
  return instance_of<S>(
      sizeof(SegmentTables<S>),
      [](const ExpertProblem& problem, const ExpertPlan& plan, const DeviceLimits& limits,
         const SplitScratch& scratch, cudaStream_t stream) {
        // Estimates: the time that the codes of a chunk take at 4 TB/s, or what it takes alone.
        constexpr ExpertCost kCost =
            kTokenTiles <= 2   ? ExpertCost{{0.35F, 0.5F, 0.75F, 1.0F}, 1.5F, 0.5F, 2.0F}
            : kTokenTiles <= 4 ? ExpertCost{{0.6F, 1.05F, 1.34F, 1.34F}, 1.8F, 0.4F, 6.0F}
                               : ExpertCost{{0.91F, 1.46F, 1.46F, 1.46F}, 2.7F, 0.54F, 6.0F};
        // For lists alone, which have most of the rows.
        if constexpr (std::is_same_v<T, __half> && kBits == 4 && !kPromotes) {
          if (problem.dispatches.empty() && has_short_groups(problem.matrix.weight)) {
            using Codes = TileShape<T, kBits, 4, 1, kTokenTiles, false, TileGroups::kShortCodes>;
            launch_expert_kernel<Codes, ListedTiles, expert_gemm<Codes, ListedTiles>>(
                problem, plan, limits, scratch, kCost, listed_tiles(problem, S::kTokens), stream);
            return;
          }
        }
        if (problem.dispatches.empty()) {
          launch_expert_kernel<S, ListedTiles, expert_gemm<S, ListedTiles>>(
              problem, plan, limits, scratch, kCost, listed_tiles(problem, S::kTokens), stream);
        } else {
          launch_expert_kernel<S, DispatchedTiles, expert_gemm<S, DispatchedTiles>>(
              problem, plan, limits, scratch, kCost, dispatched_tiles(problem, S::kTokens), stream);
        }
      });
}

template <class T, int kBits>
constexpr std::array<ExpertInstance, kExpertInstanceCount> expert_instance_list() {
  // token tiles of a warp, promotes
  return {expert_strip_instance<T, kBits>(), expert_instance<T, kBits, 1, true>(),
          expert_instance<T, kBits, 2, false>(), expert_instance<T, kBits, 4, false>(),
          expert_instance<T, kBits, 8, false>()};
}

}  // namespace marlinq::cuda::sm80
