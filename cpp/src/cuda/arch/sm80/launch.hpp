// The instantiations of the sm_80 kernels, and the plans that choose among them.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "cuda/arch_table.hpp"
#include "cuda/problem.hpp"

namespace marlinq::cuda::sm80 {

/// What a tile kernel takes, in microseconds on an H200 with 132 multiprocessors; a plan compares
/// these. Fitted to times of every plan for 12 shapes of 2048 to 57344 features at 24 to 8192 tokens
/// (tests/bench/sm80_plans.cu); docs/performance.md says how well they fit.
struct TileCost {
  double start;
  // A chunk for each group of row warps, with one, two or three blocks on a multiprocessor.
  double step[3];
  double tile;    // the end of a whole tile
  double cut;     // handing over the parts of a tile, ...
  double part;    // ... for each part,
  double block;   // ... and for each block that leaves one
  double uneven;  // runs that cross from a tile into the next
};

/// One kernel: what it is for, what it takes, how to launch it.
struct Instance {
  KernelKind kind;
  std::int32_t tokens;           // of a block's tile; at most, for kStrip
  std::int32_t features;         // of a block's tile; kTile
  std::int32_t row_warps;        // groups of warps that share K; kTile
  std::int32_t warps;            // of a block; at most, for kStrip
  std::int32_t blocks_together;  // on a multiprocessor
  // Shared memory: a stage for each warp (kStrip, without codes and records) or a slice for each
  // group of row warps (kTile, without records). sum_bytes: a slot (kStrip); for sums, beside the ring
  // or instead of it (kTile).
  std::int32_t slice_bytes;
  std::int32_t sum_bytes;
  bool sums_beside_ring;
  std::int32_t stages;  // of the ring: of each warp (kStrip), of the block (kTile)
  TileCost cost;        // kTile
  void (*launch)(const GemmProblem&, const GemmPlan&, const SplitScratch&, cudaStream_t);
};

constexpr std::size_t kInstanceCount = 9;

/// The kernels for activations of `type` and codes of `code_bits`; GemmPlan::instance is an index.
std::span<const Instance> instances(FloatType type, std::int32_t code_bits);

/// A plan of a strip kernel with so many warps a block; shared_bytes tells whether it fits.
GemmPlan strip_plan(const GemmProblem& problem, std::int32_t instance, std::int32_t multiprocessors,
                    std::int32_t warps);

/// A plan of a tile kernel on `blocks` blocks; `tail_blocks` of them share what is left after whole
/// waves. shared_bytes tells whether it fits.
GemmPlan tile_plan(const GemmProblem& problem, std::int32_t instance, std::int32_t blocks,
                   std::int32_t tail_blocks);

/// The launches of a plan, one for each slice of GemmPlan::tokens rows of x.
template <class Kernel>
void launch_slices(const Kernel& kernel, const GemmProblem& problem, const GemmPlan& plan,
                   const SplitScratch& scratch, void* stream) {
  constexpr std::int64_t kXSize = 2;
  const std::int64_t y_size = problem.y_type == FloatType::kF32 ? 4 : 2;
  for (std::int64_t first = 0; first < problem.m; first += plan.tokens) {
    GemmProblem part = problem;
    part.x = static_cast<const unsigned char*>(problem.x) + first * problem.x_stride * kXSize;
    part.y = static_cast<unsigned char*>(problem.y) + first * problem.y_stride * y_size;
    part.m = static_cast<std::int32_t>(std::min<std::int64_t>(plan.tokens, problem.m - first));
    kernel.launch(part, plan, scratch, static_cast<cudaStream_t>(stream));
  }
}

/// As ArchKernels::plan.
GemmPlan plan(const GemmProblem& problem, const DeviceLimits& limits, BatchInvariance invariance);

/// As ArchKernels::schedules and ArchKernels::plan_as.
std::vector<Schedule> schedules(const GemmProblem& problem, const DeviceLimits& limits);
GemmPlan plan_as(const GemmProblem& problem, const DeviceLimits& limits, const Schedule& schedule);

/// As ArchKernels::launch.
void launch(const GemmProblem& problem, const GemmPlan& plan, const SplitScratch& scratch,
            void* stream);

}  // namespace marlinq::cuda::sm80
