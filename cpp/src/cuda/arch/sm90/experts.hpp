// Products over experts with the sm90 kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

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

/// By rising tokens. In a plan they come after those of sm80: ExpertPlan::instance is
/// sm80::kExpertInstanceCount more than an index.
constexpr std::size_t kExpertInstanceCount = 3;

/// The kernels for activations of `type` and codes of `code_bits`.
std::span<const ExpertInstance> expert_instances(FloatType type, std::int32_t code_bits);

/// As ArchKernels::plan_experts.
ExpertPlan plan_experts(const ExpertProblem& problem, const DeviceLimits& limits,
                        BatchInvariance invariance);

/// A plan of a kernel of the caller's choice. shared_bytes tells whether it fits.
ExpertPlan expert_tile_plan(std::size_t index, const ExpertProblem& problem,
                            const DeviceLimits& limits);

/// As ArchKernels::tile_rows.
std::int32_t tile_rows(std::int64_t tokens, std::int64_t ids, std::int64_t experts,
                       BatchInvariance invariance);

/// As ArchKernels::launch_experts.
void launch_experts(const ExpertProblem& problem, const ExpertPlan& plan,
                    const DeviceLimits& limits, const SplitScratch& scratch, void* stream);

}  // namespace marlinq::cuda::sm90
