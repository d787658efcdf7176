// A mixture-of-experts block in double, token by token, as its description reads.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "marlinq/moe_block.hpp"
#include "support/generators.hpp"
#include "support/reference.hpp"

namespace marlinq::test {

/// What an activation makes of g and u.
double activation_of(Activation activation, double g, double u);

struct MoeReference {
  std::vector<Dense> gate_up;
  std::vector<Dense> down;
  Activation activation = Activation::kSilu;
  RouterWeight router_weight = RouterWeight::kOnOutput;
  std::optional<std::pair<Dense, Dense>> shared;
  std::vector<float> shared_gate;

  std::vector<double> expert(const Dense& up, const Dense& back,
                             const std::vector<double>& x) const;

  /// y [T, H] for x, ids and weights as they are stored; `shared_output` of the caller or null.
  std::vector<double> forward(const Matrix& x, const Matrix& ids, const Matrix& weights,
                              const Matrix* shared_output = nullptr) const;
};

/// ids in [0, experts), distinct in a row where there are enough, some of them -1.
Matrix random_topk_ids(std::int64_t tokens, int top_k, std::int64_t experts, DType dtype,
                       int percent_absent, Random& random, std::int64_t extra_stride = 0);

Matrix random_topk_weights(std::int64_t tokens, int top_k, Random& random,
                           std::int64_t extra_stride = 0);

/// Experts of two fused parts each, gate and up, and what they dequantise to.
struct Experts {
  std::vector<std::vector<Layer>> parts;

  std::vector<GptqTensors> tensors() const;
  std::vector<Dense> dense() const;
  GptqSpec spec() const { return parts.front().front().spec(); }
};

/// `fused_parts` modules an expert, each with a permutation of its own; every third expert is
/// plain.
Experts make_experts(std::int64_t count, int fused_parts, LayerOptions options);

}  // namespace marlinq::test
