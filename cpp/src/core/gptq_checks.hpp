// The two halves of validate(), for a backend whose tensors are on their way to a device while
// their values are looked at.
#pragma once

#include "marlinq/gptq.hpp"

namespace marlinq {

/// What can be told without a tensor's values: which tensors there are, their dtypes, shapes and
/// lengths. Fills in sizes, pointers and dtypes. Throws as validate().
GptqWeights check_shapes(const GptqTensors& tensors, const GptqSpec& spec);

/// The rest, on the result of check_shapes(): finite numbers, groups in range, the zero-point
/// convention.
void check_values(const GptqTensors& tensors, const GptqSpec& spec, GptqWeights& layer);

}  // namespace marlinq
