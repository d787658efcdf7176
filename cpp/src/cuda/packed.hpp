// Packed weights of the CUDA backend: a layer, or the experts of a stack.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "cuda/arch_table.hpp"
#include "cuda/device_weight.hpp"
#include "marlinq/linear.hpp"
#include "marlinq/load_options.hpp"

namespace marlinq::cuda {

/// On one device; immutable, and shared by any number of contexts and streams of it.
class PackedExperts {
 public:
  /// `experts` is what `weight` was packed from. Throws invalid_argument for schedules that do not fit.
  PackedExperts(DeviceWeight weight, const ArchKernels& arch, std::span<const GptqWeights> experts,
                const DeviceLimits& limits, const LoadOptions& options);

  std::int64_t num_experts() const noexcept { return weight_.experts; }
  std::int64_t k() const noexcept { return whole_.k; }
  std::int64_t n() const noexcept { return whole_.n; }

  Device device() const noexcept { return weight_.memory.device(); }
  const DeviceWeight& weight() const noexcept { return weight_; }
  const ArchKernels& arch() const noexcept { return arch_; }
  BatchInvariance invariance() const noexcept { return invariance_; }

  const Description& description() const noexcept { return whole_; }
  Description description(std::int64_t expert) const;

 private:
  // What differs from expert to expert.
  struct Part {
    bool symmetric = true;
    bool act_order = false;
    std::string zero_points;
    std::int64_t checkpoint_bytes = 0;
    std::vector<std::string> warnings;
  };

  void take_schedules(const LoadOptions& options, std::int64_t group_size,
                      const DeviceLimits& limits);

  DeviceWeight weight_;
  const ArchKernels& arch_;
  BatchInvariance invariance_;
  Description whole_;
  std::vector<Part> parts_;
};

}  // namespace marlinq::cuda
