// From a validated layer to its packed form on the device.
#pragma once

#include "cuda/device_weight.hpp"
#include "marlinq/gptq.hpp"

namespace marlinq::cuda::sm80 {

/// As ArchKernels::pack.
DeviceWeight load(const GptqWeights& weights, void* stream);

}  // namespace marlinq::cuda::sm80
