// The instantiations of the sm90 kernels, and the plans that choose among them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "cuda/arch/sm80/launch.hpp"
#include "cuda/arch/sm90/strip_plan.hpp"
#include "cuda/arch_table.hpp"
#include "cuda/problem.hpp"

namespace marlinq::cuda::sm90 {

/// What a tile kernel takes, in microseconds; a plan compares these. Fitted to times of
/// tests/bench/sm90_plans.cu.
struct TileCost {
  double start;
  double slab;
  double tile;    // the end of a tile
  double cut;     // handing over the parts of a tile, ...
  double part;    // ... for each part,
  double block;   // ... and for each block that leaves one
  double uneven;  // runs that cross from a tile into the next
  // Instead of those, where tiles are shared in pairs (TileSchedule::pair_parts):
  double pair_part = 0;   // handing over the sums of a pair, for each but the last of a tile, ...
  double pair_block = 0;  // ... and for each block
};

/// One kernel: what it takes, how to launch it.
struct Instance {
  KernelKind kind;
  std::int32_t tokens;  // of a tile; at most, for kStrip
  std::int32_t warps;   // of a block
  // kStrip
  bool streams_x;
  std::int32_t item_chunks;
  std::int32_t slot_bytes;
  std::int32_t blocks_together;  // on a multiprocessor
  // kTile
  std::int32_t blocks;          // packed blocks of features
  std::int32_t cluster_blocks;  // 1, or 2 that count as one where tiles are shared out
  bool may_share_tile;          // two blocks of a cluster, as TileSchedule::pair_parts says
  std::int32_t stage_chunks;    // 1 or 2
  std::int32_t stage_bytes;
  std::int32_t output_bytes;
  TileCost cost;
  void (*launch)(const GemmProblem&, const GemmPlan&, const SplitScratch&, cudaStream_t);
};

constexpr std::size_t kInstanceCount = 22;

/// The kernels for activations of `type` and codes of `code_bits`. In a plan they come after those of
/// sm80: GemmPlan::instance is sm80::kInstanceCount more than an index.
std::span<const Instance> instances(FloatType type, std::int32_t code_bits);

/// A plan of a strip kernel. shared_bytes tells whether it fits.
GemmPlan strip_plan(const GemmProblem& problem, std::int32_t index, const StripChoice& choice);

/// A plan of a tile kernel on at most `multiprocessors` blocks. `tail_units` of them, or of their clusters, share
/// what is left after whole waves. shared_bytes tells whether it fits.
GemmPlan tile_plan(const GemmProblem& problem, std::int32_t index, const DeviceLimits& limits,
                   std::int32_t tail_units);

/// A plan of a tile kernel whose tiles are `parts` blocks each, in pairs. shared_bytes tells whether there is one.
GemmPlan tile_pairs_plan(const GemmProblem& problem, std::int32_t index, const DeviceLimits& limits,
                         std::int32_t parts);

/// A plan of a tile kernel that cuts every tile into `parts`.
GemmPlan cut_tile_plan(const GemmProblem& problem, std::int32_t index, const DeviceLimits& limits,
                       std::int32_t parts);

/// As ArchKernels::plan.
GemmPlan plan(const GemmProblem& problem, const DeviceLimits& limits, BatchInvariance invariance);

/// As ArchKernels::schedules and ArchKernels::plan_as.
std::vector<Schedule> schedules(const GemmProblem& problem, const DeviceLimits& limits);
GemmPlan plan_as(const GemmProblem& problem, const DeviceLimits& limits, const Schedule& schedule);

/// As ArchKernels::launch.
void launch(const GemmProblem& problem, const GemmPlan& plan, const SplitScratch& scratch,
            void* stream);

}  // namespace marlinq::cuda::sm90
