// The choice of experts on the device.
#pragma once

#include <cstdint>

#include "cuda/moe/operands.hpp"
#include "marlinq/routing.hpp"

namespace marlinq::cuda {

struct RouteProblem {
  FloatMatrix logits;  // [tokens, experts]
  std::int64_t tokens = 0;
  std::int32_t experts = 1;
  std::int32_t* ids = nullptr;  // [tokens, top_k]
  std::int64_t ids_stride = 0;
  float* weights = nullptr;  // [tokens, top_k]
  std::int64_t weights_stride = 0;
};

/// marlinq::route in float32; options.correction_bias is read before the call returns.
/// `dependent_launch` as in GemmPlan.
void route(const RouteProblem& problem, const RouteOptions& options, bool dependent_launch,
           void* stream);

}  // namespace marlinq::cuda
