// A packed layer, or a stack of experts, on a device: one allocation, and where each segment of output
// features lies in it.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "cuda/completion.hpp"
#include "cuda/problem.hpp"
#include "cuda/schedule.hpp"
#include "marlinq/cuda/cuda_backend.hpp"

namespace marlinq::cuda {

/// Modules fused along N that share one row order.
struct Segment {
  WeightView view;
  std::int64_t first_feature = 0;  // of the output
  std::vector<RowsSchedule>
      schedules;  // in ascending order; other rows have the plan of the architecture
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

/// The same weight, so many bytes further.
inline WeightView moved(const WeightView& view, std::int64_t bytes) noexcept {
  WeightView result = view;
  const auto move = [bytes](auto*& pointer) {
    if (pointer == nullptr) return;
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(
        reinterpret_cast<std::uintptr_t>(pointer) + static_cast<std::uintptr_t>(bytes));
  };
  move(result.codes);
  move(result.groups);
  move(result.chunk_groups);
  move(result.bias);
  move(result.source);
  return result;
}

/// An expert of a stack as a weight of its own.
inline WeightView expert_view(const DeviceWeight& weight, const Segment& segment,
                              std::int64_t expert) noexcept {
  return moved(segment.view, expert * weight.expert_bytes);
}

}  // namespace marlinq::cuda
