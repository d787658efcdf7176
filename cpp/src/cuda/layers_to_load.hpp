// The layers of one load, one or the experts of a stack, which are looked at while their tensors are on
// their way to the device. Pure host code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/gptq_checks.hpp"
#include "marlinq/gptq.hpp"

namespace marlinq::cuda {

/// Does each check as late as it can, in the order of the layers, and once. Every function throws as
/// validate() and validate_experts().
class LayersToLoad {
 public:
  /// Borrows the arguments.
  LayersToLoad(std::span<const GptqTensors> tensors, const GptqSpec& spec);

  std::size_t size() const noexcept { return tensors_.size(); }

  /// Layer i as check_structure() leaves it at least.
  const GptqWeights& structure(std::size_t i);

  /// The same with zero points decided.
  const GptqWeights& with_zero_points(std::size_t i);

  /// Goes on with the check of scales and biases until it has been done for this share of all layers.
  void check_numbers(double share);

  /// Layer i has the row order of the first one: its copy of it goes, until with_row_orders(). Thousands
  /// of them would take longer to page in than to compare.
  void drop_row_order(std::size_t i);

  /// All layers with zero points decided, and each with its order of rows.
  std::span<const GptqWeights> with_row_orders();

  /// All layers, everything checked; some without their order of rows.
  std::span<const GptqWeights> checked();

 private:
  std::span<const GptqTensors> tensors_;
  const GptqSpec& spec_;
  std::vector<GptqWeights> layers_;  // of which the structure has been checked
  std::size_t decided_ = 0;
  std::vector<NumberCheck> checks_;  // of layers_
  std::size_t numbers_checked_ = 0;  // layers
  std::int64_t scales_seen_ = 0;     // of all
  std::int64_t scales_ = 0;
};

}  // namespace marlinq::cuda
