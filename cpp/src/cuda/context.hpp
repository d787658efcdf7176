// What a CUDA context owns between calls.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "cuda/problem.hpp"
#include "cuda/upload.hpp"
#include "marlinq/cuda/cuda_backend.hpp"

namespace marlinq::cuda {

DeviceLimits device_limits(int device);

struct ContextState {
  int device = 0;
  cudaStream_t stream = nullptr;
  DeviceLimits limits;
  std::int64_t scratch_allocations = 0;

  CudaBuffer gather;    // kFloat16 elements
  CudaBuffer partials;  // kFloat32
  CudaBuffer flags;     // kInt32, all 0 between calls
  // Buffers that a captured graph may still use; freed with the context.
  std::vector<CudaBuffer> retired;
  bool captured = false;               // some forward of this context was captured
  std::unique_ptr<Uploader> uploader;  // null before the first load

  ContextState() = default;
  ~ContextState();

  bool capturing() const;

  /// As GemmPlan::dependent_launch.
  bool dependent_launches() const noexcept { return limits.capability >= 90; }

  /// The gather scratch with room for `elements` 2-byte elements. Throws invalid_argument inside a
  /// capture that would need more.
  void* grow_gather(std::int64_t elements);

  SplitScratch split_scratch() const noexcept;

  Uploader& uploads();
};

}  // namespace marlinq::cuda
