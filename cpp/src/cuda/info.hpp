// What a loaded layer says of how it runs.
#pragma once

#include <string>

#include "cuda/arch_table.hpp"
#include "cuda/device_weight.hpp"
#include "cuda/problem.hpp"
#include "marlinq/load_options.hpp"

namespace marlinq::cuda {

/// What plan() chooses for float16 rows of a layer, from a single one to many, as text.
std::string schedule_text(const DeviceWeight& weight, const ArchKernels& arch,
                          const DeviceLimits& limits, BatchInvariance invariance);

}  // namespace marlinq::cuda
