// Packing for the sm_80 kernels, in the order of layout.hpp.
#pragma once

#include "cuda/arch/sm80/layout.hpp"
#include "cuda/device_weight.hpp"
#include "marlinq/gptq.hpp"

namespace marlinq::cuda::sm80 {

/// As ArchKernels::pack.
DeviceWeight pack(const GptqWeights& weights, void* stream);

}  // namespace marlinq::cuda::sm80
