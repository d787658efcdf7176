// A whole mixture-of-experts block of a backend B.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "marlinq/export.hpp"
#include "marlinq/linear.hpp"
#include "marlinq/types.hpp"

namespace marlinq {

/// What stands between gate_up and down, with g and u the two halves of gate_up's output.
enum class Activation : std::uint8_t {
  kSilu,           // g * sigmoid(g) * u
  kGelu,           // gelu(g) * u, by erf
  kGeluTanh,       // gelu(g) * u, by the tanh approximation
  kClampedSwiglu,  // g at most 7, u in [-7, 7]: (u + 1) * g * sigmoid(1.702 g)
};

/// "silu", "gelu", "gelu_tanh", "clamped_swiglu".
MARLINQ_API std::string_view to_string(Activation activation) noexcept;
/// The inverse of to_string. Throws invalid_argument.
MARLINQ_API Activation parse_activation(std::string_view text);

/// Where a token's routing weight is applied.
enum class RouterWeight : std::uint8_t {
  kOnOutput,  // the experts' outputs are summed with their weights
  kOnInput,   // each expert sees its weight times x, and outputs are summed as they are (Llama 4)
};

template <class B>
struct SharedExpert {
  std::shared_ptr<const Linear<B>> gate_up;  // [2 I', H], gate first
  std::shared_ptr<const Linear<B>> down;     // [H, I']
};

template <class B>
struct MoeBlockParts {
  std::shared_ptr<const MarlinExpertStack<B>> gate_up;  // k = H, n = 2 I, gate first
  std::shared_ptr<const MarlinExpertStack<B>> down;     // k = I, n = H
  Activation activation = Activation::kSilu;
  RouterWeight router_weight = RouterWeight::kOnOutput;
  std::optional<SharedExpert<B>> shared;
  /// [H], or empty: the shared output of a token is multiplied by sigmoid(x . shared_gate).
  std::vector<float> shared_gate;
};

struct MoeInput {
  ConstMatrixView x;             // [T, H] f32, f16 or bf16
  ConstMatrixView topk_ids;      // [T, top_k] i32 or i64; -1: not here, adds nothing
  ConstMatrixView topk_weights;  // [T, top_k] f32
  /// [T, H]: the output of a shared expert that the caller ran; not together with
  /// MoeBlockParts::shared.
  std::optional<ConstMatrixView> shared_output;
  /// [T, H] of x's dtype or f32, added to the output before its one rounding; it may be the output's
  /// own memory.
  std::optional<ConstMatrixView> residual;
};

/// Tokens in, combined output out. Immutable and shared by any number of contexts.
template <class B>
class MoeBlock {
 public:
  virtual ~MoeBlock() = default;

  virtual std::int64_t hidden_size() const noexcept = 0;
  virtual std::int64_t num_experts() const noexcept = 0;

  /// output [T, H], of x's dtype or f32. Throws invalid_argument for views or ids that do not fit.
  virtual void forward(typename B::Context& context, const MoeInput& input,
                       const MatrixView& output) const = 0;
};

}  // namespace marlinq
