// From a layer on its way to the device to its packed form there.
#pragma once

#include <span>

#include "cuda/device_weight.hpp"
#include "cuda/upload.hpp"
#include "marlinq/gptq.hpp"

namespace marlinq::cuda::sm80 {

/// As ArchKernels::pack.
DeviceWeight load(std::span<const GptqWeights> experts, LayerUpload& upload);
inline DeviceWeight load(const GptqWeights& layer, LayerUpload& upload) {
  return load(std::span(&layer, 1), upload);
}

}  // namespace marlinq::cuda::sm80
