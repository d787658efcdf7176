#include "cuda/packed.hpp"

#include <cstdint>
#include <utility>

#include "core/elements.hpp"
#include "core/zero_point_names.hpp"
#include "cuda/info.hpp"
#include "cuda/schedule_table.hpp"

namespace marlinq::cuda {

PackedExperts::PackedExperts(DeviceWeight weight, const ArchKernels& arch,
                             std::span<const GptqWeights> experts, const DeviceLimits& limits,
                             const LoadOptions& options)
    : weight_(std::move(weight)), arch_(arch), invariance_(options.batch_invariance) {
  const GptqWeights& first = experts.front();
  take_schedules(options, first.group_size, limits);
  whole_.backend = CudaBackend::kName;
  whole_.device = to_string(device());
  whole_.arch = arch.name;
  whole_.kernel = arch.name;
  whole_.compute = "float16 or bfloat16";  // as the activations
  whole_.schedule = schedule_text(weight_, arch, limits, invariance_);
  whole_.bits = first.bits;
  whole_.group_size = first.group_size;
  whole_.k = first.k;
  whole_.n = first.n;
  whole_.k_padded = weight_.k_padded;
  whole_.n_padded = weight_.n_padded;
  whole_.num_experts = weight_.experts;
  for (const ValidatedModule& module : first.modules) {
    whole_.fused.push_back(module.n);
    whole_.bias = whole_.bias || module.bias != nullptr;
  }
  whole_.batch_invariant = invariance_ == BatchInvariance::kRequired;
  whole_.scale_dtype = to_string(first.modules.front().scale_dtype);
  whole_.packed_bytes = weight_.memory.size() * 4;
  whole_.symmetric = true;
  for (const GptqWeights& weights : experts) {
    Part part;
    for (const ValidatedModule& module : weights.modules) {
      part.symmetric = part.symmetric && module.symmetric;
      part.act_order = part.act_order || module.act_order;
      part.checkpoint_bytes += static_cast<std::int64_t>(module.bytes);
    }
    part.zero_points = zero_point_names(weights);
    part.warnings = weights.warnings;
    whole_.symmetric = whole_.symmetric && part.symmetric;
    whole_.act_order = whole_.act_order || part.act_order;
    whole_.checkpoint_bytes += part.checkpoint_bytes;
    whole_.warnings.insert(whole_.warnings.end(), part.warnings.begin(), part.warnings.end());
    const bool same = parts_.empty() || part.zero_points == whole_.zero_points;
    whole_.zero_points = same ? part.zero_points : "mixed";
    parts_.push_back(std::move(part));
  }
}

void PackedExperts::take_schedules(const LoadOptions& options, std::int64_t group_size,
                                   const DeviceLimits& limits) {
  if (invariance_ == BatchInvariance::kRequired) return;
  for (Segment& segment : weight_.segments) {
    const ScheduleEntry layer = entry_of(device().index, arch_, segment.view, group_size);
    segment.schedules = options.schedules == nullptr
                            ? measured_schedules_of(layer, arch_, segment.view, limits)
                            : schedules_of(*options.schedules, layer, arch_, segment.view, limits);
  }
}

Description PackedExperts::description(std::int64_t expert) const {
  const Part& part = parts_[static_cast<std::size_t>(expert)];
  Description d = whole_;
  d.num_experts = 1;
  d.symmetric = part.symmetric;
  d.act_order = part.act_order;
  d.zero_points = part.zero_points;
  d.packed_bytes = weight_.expert_bytes;
  d.checkpoint_bytes = part.checkpoint_bytes;
  d.warnings = part.warnings;
  return d;
}

}  // namespace marlinq::cuda
