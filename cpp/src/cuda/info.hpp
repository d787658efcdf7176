// What the backend says of layers and devices.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "cuda/arch_table.hpp"
#include "cuda/device_weight.hpp"
#include "cuda/problem.hpp"
#include "marlinq/load_options.hpp"

namespace marlinq::cuda {

/// The plans of float16 rows of a layer, from a single one to many, and the rows that have measured schedules, as text.
std::string schedule_text(const DeviceWeight& weight, const ArchKernels& arch,
                          const DeviceLimits& limits, BatchInvariance invariance);

/// What an error of cudaGetDeviceCount() means. Without a driver the runtime calls it too old.
std::string why_no_devices(cudaError_t status);

}  // namespace marlinq::cuda
