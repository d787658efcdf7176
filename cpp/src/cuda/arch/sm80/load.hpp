// From a layer on its way to the device to its packed form there.
#pragma once

#include "cuda/device_weight.hpp"
#include "cuda/upload.hpp"
#include "marlinq/gptq.hpp"

namespace marlinq::cuda::sm80 {

/// As ArchKernels::pack.
DeviceWeight load(const GptqWeights& weights, LayerUpload& upload);

}  // namespace marlinq::cuda::sm80
