// Launches one instantiation of a kernel.
#pragma once

#include "cuda/arch/sm80/kernel.cuh"
#include "cuda/arch/sm80/launch.hpp"
#include "cuda/arch/sm80/strip_kernel.cuh"
#include "cuda/cuda_check.hpp"

namespace marlinq::cuda::sm80 {

template <class Params>
void launch_kernel(void (*kernel)(Params), const Params& params, dim3 grid, int threads,
                   const GemmPlan& plan, cudaStream_t stream) {
  // An attribute of the function on this device: cheap, and allowed during a capture.
  MARLINQ_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes));
  cudaLaunchAttribute dependent{};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = &dependent;
  config.numAttrs = plan.dependent_launch ? 1 : 0;
  MARLINQ_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params));
}

template <class T>
constexpr FloatType kFloatTypeOf = std::is_same_v<T, __half> ? FloatType::kF16 : FloatType::kBF16;

template <class S>
constexpr Instance tile_instance() {
  return {.kind = KernelKind::kTile,
          .type = kFloatTypeOf<typename S::T>,
          .code_bits = S::kBits,
          .token_tile = S::kTokens,
          .feature_tile = S::kFeatures,
          .ring_bytes = S::kSharedBytes,
          .slot_bytes = 0,
          .warps = kWarps,
          .launch = [](const GemmProblem& problem, const GemmPlan& plan,
                       const SplitScratch& scratch, cudaStream_t stream) {
            const dim3 grid((problem.m + S::kTokens - 1) / S::kTokens,
                            (problem.weight.n + S::kFeatures - 1) / S::kFeatures, plan.splits);
            launch_kernel(gemm<S>, KernelParams{problem, scratch, plan.splits}, grid, kWarps * 32,
                          plan, stream);
          }};
}

template <class S>
constexpr Instance strip_instance() {
  return {.kind = KernelKind::kStrip,
          .type = kFloatTypeOf<typename S::T>,
          .code_bits = S::kBits,
          .token_tile = S::kTokens,
          .feature_tile = S::kFeatures,
          .ring_bytes = S::kRingBytes,
          .slot_bytes = S::kSlotFloats * 4,
          .warps = S::kWarps,
          .launch = [](const GemmProblem& problem, const GemmPlan& plan, const SplitScratch&,
                       cudaStream_t stream) {
            launch_kernel(strip_gemm<S>, problem, dim3(plan.blocks), S::kWarps * 32, plan, stream);
          }};
}

}  // namespace marlinq::cuda::sm80
