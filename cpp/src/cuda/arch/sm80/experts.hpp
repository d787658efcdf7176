// Products over experts with the sm_80 kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/arch_table.hpp"
#include "cuda/problem.hpp"

namespace marlinq::cuda::sm80 {

/// One kernel: what it takes, how to launch it.
struct ExpertInstance {
  std::int32_t tokens;           // of a tile
  std::int32_t features;         // of a tile
  std::int32_t row_warps;        // groups of warps that share K
  std::int32_t blocks_together;  // on a multiprocessor
  std::int32_t slice_bytes;      // of shared memory, without records
  std::int32_t stages;
  std::int32_t table_bytes;
  void (*launch)(const ExpertProblem&, const ExpertPlan&, const DeviceLimits&, const SplitScratch&,
                 cudaStream_t);
};

/// The first is for tiles of a few rows, whose warps have streams of their own. The others come by rising tokens. Those
/// that promote need no scales that divide; those that do not give a row the same bits in any batch.
constexpr std::size_t kExpertInstanceCount = 5;

/// What the parameters of a kernel hold, which may have 32 KB.
constexpr int kMostDispatches = 1024;

/// What the blocks of the first kernel sort by themselves. It takes the longer the more ids there are; so many
/// save most of a launch.
constexpr std::int32_t kMostSortedIds = 128;

/// The kernels for activations of `type` and codes of `code_bits`; ExpertPlan::instance is an index.
std::span<const ExpertInstance> expert_instances(FloatType type, std::int32_t code_bits);

/// The most tiles that a kernel of so many tokens can meet: each of the lists' has an id.
std::int64_t most_tiles(const ExpertProblem& problem, std::int32_t tokens);

/// Of a tile of the lists, or of a dispatch.
std::int32_t most_rows(const ExpertProblem& problem);

/// As ArchKernels::plan_experts.
ExpertPlan plan_experts(const ExpertProblem& problem, const DeviceLimits& limits,
                        BatchInvariance invariance);

/// The same with a kernel of the caller's choice, which holds a whole tile of rows or a part of it.
ExpertPlan plan_experts_with(std::size_t instance, const ExpertProblem& problem,
                             const DeviceLimits& limits, BatchInvariance invariance);

/// As ArchKernels::tile_rows.
std::int32_t tile_rows(std::int64_t tokens, std::int64_t ids, std::int64_t experts,
                       BatchInvariance invariance);

/// As ArchKernels::most_sorted_ids.
std::int32_t most_sorted_ids(const ExpertProblem& problem, const DeviceLimits& limits,
                             BatchInvariance invariance);

/// As ArchKernels::launch_experts.
void launch_experts(const ExpertProblem& problem, const ExpertPlan& plan,
                    const DeviceLimits& limits, const SplitScratch& scratch, void* stream);

}  // namespace marlinq::cuda::sm80
