// How a layer's file stores zero points, as descriptions name it.
#pragma once

#include <string>

#include "marlinq/gptq.hpp"

namespace marlinq {

/// "v1", "v2", or "mixed" where fused modules differ.
inline std::string zero_point_names(const GptqWeights& weights) {
  bool v1 = false;
  bool v2 = false;
  for (const ValidatedModule& part : weights.modules) {
    (part.zero_points == ZeroPoints::kV1 ? v1 : v2) = true;
  }
  return v1 && v2 ? "mixed" : v1 ? "v1" : "v2";
}

}  // namespace marlinq
