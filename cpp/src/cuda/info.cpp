// What the backend says of itself, its devices and its layers.
#include "cuda/info.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "core/concat.hpp"
#include "cuda/cuda_check.hpp"
#include "cuda/schedule_table.hpp"
#include "marlinq/cuda/cuda_backend.hpp"

namespace marlinq {
namespace cuda {

std::string schedule_text(const DeviceWeight& weight, const ArchKernels& arch,
                          const DeviceLimits& limits, BatchInvariance invariance) {
  std::string text;
  for (const std::int32_t m : {1, 16, 64, 512}) {
    const Segment& segment = weight.segments.front();
    const GemmPlan plan = plan_rows(problem_without_data(segment.view, m), segment.schedules, arch,
                                    limits, invariance);
    text += concat(text.empty() ? "" : "; ", "m ", m, ": ",
                   plan.kind == KernelKind::kStrip ? "strips" : "tiles", " on ", plan.blocks,
                   " blocks of ", plan.warps, " warps");
  }
  std::string measured;
  for (const RowsSchedule& rows : weight.segments.front().schedules)
    measured +=
        concat(measured.empty() ? "; measured for m " : ", ", rows.first_rows, "-", rows.last_rows);
  return text + measured;
}

std::string why_no_devices(cudaError_t status) {
  int driver = 0;
  const bool absent = cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0;
  (void)cudaGetLastError();
  return absent ? "no NVIDIA driver is installed" : cudaGetErrorString(status);
}

}  // namespace cuda

BackendInfo CudaBackend::info() {
  BackendInfo info{.name = std::string(kName),
                   .devices = {},
                   .hardware = {},
                   .kernels = {},
                   .compute = {"auto"}};
  int count = 0;
  // Without a driver or a device there is nothing to list, and nothing wrong.
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    (void)cudaGetLastError();
    count = 0;
  }
  if (count == 0) {
    info.hardware = status == cudaSuccess ? "none" : concat("none: ", cuda::why_no_devices(status));
  }
  int best = 0;
  for (int device = 0; device < count; ++device) {
    info.devices.push_back(to_string(Device{DeviceKind::kCuda, device}));
    cudaDeviceProp properties;
    MARLINQ_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    info.hardware += concat(device == 0 ? "" : ", ", properties.name, " (", properties.major, ".",
                            properties.minor, ")");
    best = std::max(best, 10 * properties.major + properties.minor);
  }
  bool found = false;
  for (const cuda::ArchKernels* arch : cuda::arch_kernels()) {
    const bool usable = arch->runs_on(best);
    info.kernels.push_back({.name = arch->name,
                            .requires_features = arch->requirement,
                            .usable = usable,
                            .chosen = usable && !found});
    found = found || usable;
  }
  return info;
}

}  // namespace marlinq
