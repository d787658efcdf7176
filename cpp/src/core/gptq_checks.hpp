// The parts of validate(), for a backend whose tensors are on their way to a device while their
// values are looked at.
#pragma once

#include <cstddef>
#include <cstdint>

#include "marlinq/gptq.hpp"

namespace marlinq {

/// What needs no look at codes, zero points, scales and bias: which tensors there are, their
/// dtypes, shapes and lengths, and the group of each row. Throws as validate().
GptqWeights check_structure(const GptqTensors& tensors, const GptqSpec& spec);

/// The zero-point convention, on the result of check_structure().
void decide_zero_points(const GptqTensors& tensors, const GptqSpec& spec, GptqWeights& layer);

/// Scales and biases: finite numbers, and the range of the scales. On the result of
/// check_structure(), some at a time; borrows what it is given.
class NumberCheck {
 public:
  NumberCheck(const GptqTensors& tensors, const GptqSpec& spec, GptqWeights& layer)
      : tensors_(&tensors), spec_(&spec), layer_(&layer) {}

  /// Looks at so many more scales, in their order. Throws as validate().
  void look(std::int64_t scales);
  bool ended() const noexcept { return module_ == layer_->modules.size(); }

 private:
  const GptqTensors* tensors_;
  const GptqSpec* spec_;
  GptqWeights* layer_;
  std::size_t module_ = 0;
  std::int64_t seen_ = 0;  // of the module's scales
};

/// Both, for all of the layer: what validate() does after check_structure().
void check_values(const GptqTensors& tensors, const GptqSpec& spec, GptqWeights& layer);

}  // namespace marlinq
