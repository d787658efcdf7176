// The elementwise steps of a MoE block on the device: the activation between its two products, and
// the sum of its experts' outputs. One launch each; arithmetic in float32, one rounding at the end.
#pragma once

#include <cstdint>

#include "cuda/moe/operands.hpp"
#include "marlinq/moe_block.hpp"

namespace marlinq::cuda {

struct ActivateProblem {
  FloatMatrix gate_up;  // [rows, 2 inner], gate first
  FloatOutput hidden;   // [rows, inner] float16 or bfloat16
  std::int32_t rows = 0;
  std::int32_t inner = 0;
  Activation activation = Activation::kSilu;
};

/// hidden = activation(gate, up). `dependent_launch` as in GemmPlan.
void activate(const ActivateProblem& problem, bool dependent_launch, void* stream);

/// out[t] = sum over s of weights[t, s] * expert_output[t * top_k + s], in the order of s, plus
/// sigmoid(x[t] . shared_gate) * shared[t], plus residual[t].
struct CombineProblem {
  /// [tokens * top_k, hidden]. Rows whose id is none of the num_experts experts are not read.
  FloatMatrix expert_output = {};
  TopkIds topk_ids;
  std::int32_t num_experts = 0;
  /// Ids and weights are older than the kernel before, which started after they had been written.
  bool settled = false;
  const float* topk_weights = nullptr;  // [tokens, top_k]; null: all 1
  std::int64_t topk_weights_stride = 0;
  FloatMatrix shared = {};             // [tokens, hidden], or absent
  const float* shared_gate = nullptr;  // [hidden] on the device; null: the factor is 1
  FloatMatrix x = {};                  // [tokens, hidden], where there is a shared gate
  FloatMatrix residual = {};           // [tokens, hidden], or absent; may be `out`
  FloatOutput out;                     // [tokens, hidden]
  std::int32_t hidden = 0;
};

/// A row has the same bits whatever the other rows are.
void combine(const CombineProblem& problem, const DeviceLimits& limits, bool dependent_launch,
             void* stream);

}  // namespace marlinq::cuda
