// A packed layer, or a stack of experts, on a device: one allocation, and where each segment of output
// features lies in it.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/completion.hpp"
#include "cuda/problem.hpp"
#include "marlinq/cuda/cuda_backend.hpp"

namespace marlinq::cuda {

/// Modules fused along N that share one row order.
struct Segment {
  WeightView view;
  std::int64_t first_feature = 0;  // of the output
};

/// An expert of a stack is a slot of its own: its segments are those of expert 0, so many bytes
/// further.
struct DeviceWeight {
  CudaBuffer memory;
  std::int64_t experts = 1;
  std::int64_t expert_bytes = 0;
  Completion ready;               // the packing, which may go on after the load has returned
  std::vector<Segment> segments;  // of expert 0
  std::int64_t k_padded = 0;
  std::int64_t n_padded = 0;
};

}  // namespace marlinq::cuda
