// The instantiations of the sm_80 kernel and the choice among them.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/arch_table.hpp"
#include "cuda/problem.hpp"

namespace marlinq::cuda::sm80 {

GemmPlan plan(const WeightView& weight, std::int32_t m, const DeviceLimits& limits, BatchInvariance invariance);
void scratch_need(const DeviceLimits& limits, std::int64_t& partial_floats, std::int32_t& counters);
void launch(const GemmProblem& problem, const GemmPlan& plan, const SplitScratch& scratch, void* stream);

/// One kernel: tile and how to launch it.
struct Instance {
  FloatType type;
  std::int32_t code_bits;
  std::int32_t token_tile;
  std::int32_t feature_tile;
  void (*launch)(const GemmProblem&, const GemmPlan&, const SplitScratch&, cudaStream_t);
};

}  // namespace marlinq::cuda::sm80
