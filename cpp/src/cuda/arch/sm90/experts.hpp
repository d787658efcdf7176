// Products over experts with the sm90 kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "cuda/arch/sm80/experts.hpp"
#include "cuda/problem.hpp"

namespace marlinq::cuda::sm90 {

/// One kernel: what it takes, how to launch it.
struct ExpertInstance {
  std::int32_t tokens;       // of a tile
  std::int32_t blocks;       // of a tile, packed blocks of features
  std::int32_t stage_bytes;  // of shared memory, without records
  std::int32_t other_bytes;  // beside the stages
  void (*launch)(const ExpertProblem&, const ExpertPlan&, const SplitScratch&, cudaStream_t);
};

/// The kernel for tiles of a few rows.
struct ExpertStripInstance {
  std::int32_t tokens;  // of a tile
  std::int32_t item_chunks;
  std::int32_t stages;       // of the ring of a warp, an item each
  std::int32_t stage_bytes;  // of shared memory, without records
  std::int32_t part_bytes;   // of a warp, beside its ring
  std::int32_t other_bytes;
  std::int32_t most_warps;
  std::int32_t blocks_together;  // on a multiprocessor
  void (*launch)(const ExpertProblem&, const ExpertPlan&, const SplitScratch&, cudaStream_t);
};

constexpr std::size_t kExpertInstanceCount = 3;

/// What activations of a type and codes of a width have.
struct ExpertKernels {
  ExpertStripInstance strips;
  std::array<ExpertInstance, kExpertInstanceCount> tiles;  // by rising tokens
};

/// Tiles of the kernels go over neighbours of a caller's lists that have one expert, where these are not more, ...
constexpr std::int32_t kMostJoinedTiles = 1536;
/// ... and begin at multiples of so many slots.
constexpr std::int32_t kJoinedSlots = 8;

/// Whether the lists of a problem are such, as moe_align_block_size makes them.
bool may_join_tiles(const ExpertProblem& problem);

/// In a plan the kernels come after those of sm80: ExpertPlan::instance of a tile kernel is this more than its index, ...
constexpr std::int32_t kFirstExpertTiles = sm80::kExpertInstanceCount;
/// ... and that of the other this.
constexpr std::int32_t kExpertStrips = kFirstExpertTiles + kExpertInstanceCount;

const ExpertKernels& expert_kernels(FloatType type, std::int32_t code_bits);

/// As ArchKernels::plan_experts.
ExpertPlan plan_experts(const ExpertProblem& problem, const DeviceLimits& limits,
                        BatchInvariance invariance);

/// A plan of a kernel of the caller's choice. shared_bytes tells whether it fits.
ExpertPlan expert_tile_plan(std::size_t index, const ExpertProblem& problem,
                            const DeviceLimits& limits);

/// The same of the kernel for a few rows.
ExpertPlan expert_strip_plan(const ExpertProblem& problem, const DeviceLimits& limits);

/// As ArchKernels::tile_rows.
std::int32_t tile_rows(std::int64_t tokens, std::int64_t ids, std::int64_t experts,
                       BatchInvariance invariance);

/// As ArchKernels::most_sorted_ids.
std::int32_t most_sorted_ids(const ExpertProblem& problem, const DeviceLimits& limits,
                             BatchInvariance invariance);

/// As ArchKernels::launch_experts.
void launch_experts(const ExpertProblem& problem, const ExpertPlan& plan,
                    const DeviceLimits& limits, const SplitScratch& scratch, void* stream);

}  // namespace marlinq::cuda::sm90
