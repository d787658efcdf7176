// The default MoE block: align, gate_up, activation, down, combine, over any backend's expert
// stacks and a few elementwise primitives. Intermediate results are float32.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>

#include "core/matrix_checks.hpp"
#include "marlinq/backend.hpp"
#include "marlinq/moe_block.hpp"
#include "marlinq/routing.hpp"

namespace marlinq {

/// Names of the float32 matrices that a context keeps for a block between its steps.
enum class MoeScratch : std::uint8_t {
  kScaledInput,
  kGateUp,
  kHidden,
  kDown,
  kSharedGateUp,
  kSharedHidden,
  kShared
};

/// How the outputs of a token's experts, of a shared expert and a residual become its output row.
struct MoeCombine {
  ConstMatrixView expert_output;  // f32 [T * top_k, H]
  ConstMatrixView topk_ids;       // [T, top_k]; a negative id adds nothing
  ConstMatrixView topk_weights;   // f32 [T, top_k]; null data: sum as they are
  ConstMatrixView x;              // for the shared gate
  std::optional<ConstMatrixView> shared;
  std::span<const float> shared_gate;  // [H] or empty
  std::optional<ConstMatrixView> residual;
};

template <class B>
concept MoePrimitives =
    Backend<B> && requires(typename B::Context& context, MoeScratch slot, std::int64_t count,
                           const ConstMatrixView& in, const MatrixView& out, Activation activation,
                           const MoeCombine& combine) {
      {
        B::moe_scratch(context, slot, count, count)
      } -> std::same_as<MatrixView>;  // f32, grows only
      // The tile lists of topk_ids for one block size of the backend's choice, in the context's
      // memory.
      { B::moe_align(context, in, count) } -> std::same_as<FusedTiles>;
      { B::moe_activate(context, activation, in, out) } -> std::same_as<void>;
      {
        B::moe_scale_rows(context, in, in, out)
      } -> std::same_as<void>;  // out[t * top_k + s] = w[t, s] * x[t]
      { B::moe_combine(context, combine, out) } -> std::same_as<void>;
    };

/// Everything about a block's parts that can be wrong, for any backend. Throws invalid_argument.
template <class B>
void check_moe_parts(const MoeBlockParts<B>& parts) {
  if (parts.gate_up == nullptr || parts.down == nullptr) {
    refuse_argument("MoeBlock: gate_up and down are needed");
  }
  const std::int64_t hidden = parts.gate_up->k();
  const std::int64_t inner = parts.down->k();
  if (parts.gate_up->n_per_expert() != 2 * inner) {
    refuse_argument(concat("gate_up: n = ", parts.gate_up->n_per_expert(),
                           ", expected 2 * k of down = ", 2 * inner));
  }
  if (parts.down->n_per_expert() != hidden) {
    refuse_argument(
        concat("down: n = ", parts.down->n_per_expert(), ", expected k of gate_up = ", hidden));
  }
  if (parts.down->num_experts() != parts.gate_up->num_experts()) {
    refuse_argument(concat("down: ", parts.down->num_experts(), " experts, expected ",
                           parts.gate_up->num_experts(), " as in gate_up"));
  }
  if (parts.gate_up->num_experts() > kMaxExperts) {
    refuse_argument(concat("gate_up: ", parts.gate_up->num_experts(), " experts, expected at most ",
                           kMaxExperts));
  }
  if (parts.shared) {
    if (parts.shared->gate_up == nullptr || parts.shared->down == nullptr) {
      refuse_argument("shared expert: gate_up and down are needed, only one was given");
    }
    const Linear<B>& gate_up = *parts.shared->gate_up;
    const Linear<B>& down = *parts.shared->down;
    if (gate_up.in_features() != hidden) {
      refuse_argument(concat("shared gate_up: k = ", gate_up.in_features(), ", expected ", hidden));
    }
    if (gate_up.out_features() != 2 * down.in_features()) {
      refuse_argument(concat("shared gate_up: n = ", gate_up.out_features(),
                             ", expected 2 * k of shared down = ", 2 * down.in_features()));
    }
    if (down.out_features() != hidden) {
      refuse_argument(concat("shared down: n = ", down.out_features(), ", expected ", hidden));
    }
  }
  if (!parts.shared_gate.empty() && static_cast<std::int64_t>(parts.shared_gate.size()) != hidden) {
    refuse_argument(
        concat("shared_gate: ", parts.shared_gate.size(), " elements, expected ", hidden));
  }
}

/// Everything about a block's input that needs no look at the ids. Throws invalid_argument.
inline void check_moe_input(const MoeInput& input, const MatrixView& output, Device device,
                            std::int64_t hidden, bool has_shared_expert) {
  check_input(input.x, "x", device, 0, hidden);
  const std::int64_t tokens = input.x.rows;
  const std::int64_t top_k = input.topk_ids.cols;
  if (input.topk_ids.dtype != DType::kInt32 && input.topk_ids.dtype != DType::kInt64) {
    refuse_argument(
        concat("topk_ids: dtype ", to_string(input.topk_ids.dtype), ", expected int32 or int64"));
  }
  if (top_k < 1 || top_k > kMaxTopK) {
    refuse_argument(concat("topk_ids: top_k = ", top_k, ", expected 1 to ", kMaxTopK));
  }
  if (input.topk_ids.rows != tokens) {
    refuse_argument(
        concat("topk_ids: ", input.topk_ids.rows, " rows, expected ", tokens, " as in x"));
  }
  check_matrix(input.topk_ids, "topk_ids", device, tokens, top_k);
  if (input.topk_weights.dtype != DType::kFloat32) {
    refuse_argument(
        concat("topk_weights: dtype ", to_string(input.topk_weights.dtype), ", expected float32"));
  }
  check_matrix(input.topk_weights, "topk_weights", device, tokens, top_k);
  if (input.shared_output) {
    if (has_shared_expert)
      refuse_argument("shared_output: given, but the block runs a shared expert itself");
    check_input(*input.shared_output, "shared_output", device, tokens, hidden);
  }
  if (input.residual) {
    check_output(*input.residual, "residual", device, tokens, hidden, input.x.dtype);
  }
  check_output(output, "out", device, tokens, hidden, input.x.dtype);
}

template <MoePrimitives B>
class MoeBlockOverPhases final : public MoeBlock<B> {
 public:
  explicit MoeBlockOverPhases(MoeBlockParts<B> parts) : parts_(std::move(parts)) {
    check_moe_parts(parts_);
  }

  std::int64_t hidden_size() const noexcept override { return parts_.gate_up->k(); }
  std::int64_t num_experts() const noexcept override { return parts_.gate_up->num_experts(); }

  void forward(typename B::Context& context, const MoeInput& input,
               const MatrixView& output) const override {
    check_moe_input(input, output, context.device(), hidden_size(), parts_.shared.has_value());
    const std::int64_t tokens = input.x.rows;
    if (tokens == 0) return;
    const std::int64_t top_k = input.topk_ids.cols;
    const std::int64_t ids = tokens * top_k;
    const std::int64_t inner = parts_.down->k();

    FusedTiles tiles = B::moe_align(context, input.topk_ids, num_experts());
    const MatrixView gate_up = B::moe_scratch(context, MoeScratch::kGateUp, ids, 2 * inner);
    if (parts_.router_weight == RouterWeight::kOnInput) {
      const MatrixView scaled =
          B::moe_scratch(context, MoeScratch::kScaledInput, ids, hidden_size());
      B::moe_scale_rows(context, input.x, input.topk_weights, scaled);
      parts_.gate_up->gemm_phase_fused(context, as_const(scaled), per_id(tiles), gate_up);
    } else {
      parts_.gate_up->gemm_phase_fused(context, input.x, tiles, gate_up);
    }
    const MatrixView hidden = B::moe_scratch(context, MoeScratch::kHidden, ids, inner);
    B::moe_activate(context, parts_.activation, as_const(gate_up), hidden);
    const MatrixView down = B::moe_scratch(context, MoeScratch::kDown, ids, hidden_size());
    parts_.down->gemm_phase_fused(context, as_const(hidden), per_id(tiles), down);

    MoeCombine combine{.expert_output = as_const(down),
                       .topk_ids = input.topk_ids,
                       .topk_weights = input.topk_weights,
                       .x = input.x,
                       .shared = input.shared_output,
                       .shared_gate = parts_.shared_gate,
                       .residual = input.residual};
    if (parts_.router_weight == RouterWeight::kOnInput) combine.topk_weights.data = nullptr;
    if (parts_.shared) combine.shared = run_shared_expert(context, input.x);
    B::moe_combine(context, combine, output);
  }

 private:
  // The same tiles over a matrix that has a row per id.
  static FusedTiles per_id(FusedTiles tiles) {
    tiles.num_tokens *= tiles.top_k;
    tiles.top_k = 1;
    return tiles;
  }

  ConstMatrixView run_shared_expert(typename B::Context& context, const ConstMatrixView& x) const {
    const std::int64_t inner = parts_.shared->down->in_features();
    const MatrixView gate_up =
        B::moe_scratch(context, MoeScratch::kSharedGateUp, x.rows, 2 * inner);
    parts_.shared->gate_up->forward(context, x, gate_up, x.rows);
    const MatrixView hidden = B::moe_scratch(context, MoeScratch::kSharedHidden, x.rows, inner);
    B::moe_activate(context, parts_.activation, as_const(gate_up), hidden);
    const MatrixView shared = B::moe_scratch(context, MoeScratch::kShared, x.rows, hidden_size());
    parts_.shared->down->forward(context, as_const(hidden), shared, x.rows);
    return as_const(shared);
  }

  MoeBlockParts<B> parts_;
};

}  // namespace marlinq
