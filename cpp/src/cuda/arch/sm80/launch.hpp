// The instantiations of the sm_80 kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/arch_table.hpp"
#include "cuda/problem.hpp"

namespace marlinq::cuda::sm80 {

/// One kernel: what it is for, what it takes, how to launch it.
struct Instance {
  KernelKind kind;
  FloatType type;
  std::int32_t code_bits;
  std::int32_t token_tile;
  std::int32_t feature_tile;
  // kStrip: shared memory of the rings, and of the sums for each strip group and each warp.
  std::int32_t ring_bytes;
  std::int32_t slot_bytes;
  std::int32_t warps;
  void (*launch)(const GemmProblem&, const GemmPlan&, const SplitScratch&, cudaStream_t);
};

}  // namespace marlinq::cuda::sm80
