// The two halves of validate(), for a backend whose tensors are on their way to a device while
// their values are looked at.
#pragma once

#include "marlinq/gptq.hpp"

namespace marlinq {

/// What needs no look at codes, zero points, scales and bias: which tensors there are, their
/// dtypes, shapes and lengths, and the group of each row. Throws as validate().
GptqWeights check_structure(const GptqTensors& tensors, const GptqSpec& spec);

/// The rest, on the result of check_structure(): finite numbers, their range, the zero-point
/// convention.
void check_values(const GptqTensors& tensors, const GptqSpec& spec, GptqWeights& layer);

}  // namespace marlinq
