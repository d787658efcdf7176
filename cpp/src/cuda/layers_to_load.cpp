#include "cuda/layers_to_load.hpp"

#include <algorithm>
#include <cstdint>

#include "core/load_gptq.hpp"

namespace marlinq::cuda {

LayersToLoad::LayersToLoad(std::span<const GptqTensors> tensors, const GptqSpec& spec)
    : tensors_(tensors), spec_(spec) {
  check_any_experts(tensors);
  layers_.reserve(tensors.size());  // checks point to them
  checks_.reserve(tensors.size());
  const GptqWeights& first = structure(0);
  scales_ = first.groups * first.n * static_cast<std::int64_t>(tensors.size());
}

const GptqWeights& LayersToLoad::structure(std::size_t i) {
  while (layers_.size() <= i) {
    const std::size_t next = layers_.size();
    layers_.push_back(check_expert_structure(tensors_, next, spec_, layers_));
    checks_.emplace_back(tensors_[next], spec_, layers_.back());
  }
  return layers_[i];
}

const GptqWeights& LayersToLoad::with_zero_points(std::size_t i) {
  structure(i);
  for (; decided_ <= i; ++decided_)
    decide_zero_points(tensors_[decided_], spec_, layers_[decided_]);
  return layers_[i];
}

void LayersToLoad::check_numbers(double share) {
  const auto wanted = static_cast<std::int64_t>(share * static_cast<double>(scales_));
  while (scales_seen_ < wanted) {
    structure(numbers_checked_);
    const std::int64_t of_layer = scales_ / static_cast<std::int64_t>(size());
    const auto before = static_cast<std::int64_t>(numbers_checked_) * of_layer;
    const std::int64_t step = std::min(wanted, before + of_layer) - scales_seen_;
    NumberCheck& check = checks_[numbers_checked_];
    check.look(step);
    scales_seen_ += step;
    if (check.ended()) ++numbers_checked_;
  }
}

void LayersToLoad::drop_row_order(std::size_t i) {
  if (i == 0) return;
  for (ValidatedModule& module : layers_[i].modules) module.group_of_row = {};
}

std::span<const GptqWeights> LayersToLoad::with_row_orders() {
  with_zero_points(size() - 1);
  for (GptqWeights& layer : layers_) {
    for (std::size_t m = 0; m < layer.modules.size(); ++m) {
      ValidatedModule& module = layer.modules[m];
      if (module.group_of_row.empty())
        module.group_of_row = layers_.front().modules[m].group_of_row;
    }
  }
  return layers_;
}

std::span<const GptqWeights> LayersToLoad::checked() {
  with_zero_points(size() - 1);
  check_numbers(1.0);
  return layers_;
}

}  // namespace marlinq::cuda
