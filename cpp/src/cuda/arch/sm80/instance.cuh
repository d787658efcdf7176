// Launches one instantiation of the kernel.
#pragma once

#include "cuda/arch/sm80/kernel.cuh"
#include "cuda/arch/sm80/launch.hpp"
#include "cuda/cuda_check.hpp"

namespace marlinq::cuda::sm80 {

template <class S>
void launch_instance(const GemmProblem& problem, const GemmPlan& plan, const SplitScratch& scratch,
                     cudaStream_t stream) {
  const KernelParams params{problem, scratch, plan.splits};
  // An attribute of the function on this device: cheap, and allowed during a capture.
  MARLINQ_CUDA_CHECK(cudaFuncSetAttribute(gemm<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes));
  const dim3 grid((problem.m + S::kTokens - 1) / S::kTokens, (problem.weight.n + S::kFeatures - 1) / S::kFeatures,
                  plan.splits);
  gemm<S><<<grid, kWarps * 32, S::kSharedBytes, stream>>>(params);
  MARLINQ_CUDA_CHECK(cudaGetLastError());
}

template <class S>
constexpr Instance instance() {
  return {std::is_same_v<typename S::T, __half> ? FloatType::kF16 : FloatType::kBF16, S::kBits, S::kTokens, S::kFeatures,
          launch_instance<S>};
}

}  // namespace marlinq::cuda::sm80
