// From a layer on its way to the device to its packed form there.
#pragma once

#include "cuda/device_weight.hpp"
#include "cuda/layers_to_load.hpp"
#include "cuda/upload.hpp"

namespace marlinq::cuda::sm80 {

/// As ArchKernels::pack.
DeviceWeight load(LayersToLoad& experts, LayerUpload& upload);

}  // namespace marlinq::cuda::sm80
