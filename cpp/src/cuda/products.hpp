// Products with packed weights on a context's stream: the gather of x where it is needed, the plan, the
// launch.
#pragma once

#include <cstdint>
#include <span>

#include "cuda/context.hpp"
#include "cuda/moe/operands.hpp"
#include "cuda/packed.hpp"
#include "cuda/problem.hpp"

namespace marlinq::cuda {

/// The first m rows of x through one expert, or through a layer. Views have been checked.
void run_rows(ContextState& state, const PackedExperts& packed, std::int64_t expert,
              const ConstMatrixView& input, const MatrixView& output, std::int64_t m);

/// A product over experts; ExpertProblem says what the fields mean. Of `tiles` and `dispatches` one is
/// given.
struct ExpertPhase {
  FloatMatrix x = {};
  std::int64_t x_rows = 0;
  TokenTileLists tiles = {};
  std::span<const ExpertRows> dispatches = {};
  std::int32_t top_k = 1;
  bool x_by_slot = false;
  FloatOutput y = {};  // of the type that x is multiplied in, or float32
  bool y_by_slot = false;
  const float* weights = nullptr;
  std::int64_t weights_stride = 0;
  bool weights_bias = true;
  bool activates = false;
  Activation activation = Activation::kSilu;
  bool follows_product = false;
};

/// What x is multiplied in: float32 is rounded to float16.
constexpr FloatType multiplied_in(FloatType x) noexcept {
  return x == FloatType::kBF16 ? FloatType::kBF16 : FloatType::kF16;
}

/// Whether a product with these weights can apply an activation.
bool can_activate(const PackedExperts& packed);

/// 2-byte elements of the gather scratch that a phase takes, for any routing.
std::int64_t gather_need(const ContextState& state, const PackedExperts& packed,
                         const ExpertPhase& phase);

/// Whether the kernels of this phase sort so many ids by themselves: TokenTileLists::topk.
bool sorts_ids(const ContextState& state, const PackedExperts& packed, const ExpertPhase& phase,
               std::int64_t ids);

void run_phase(ContextState& state, const PackedExperts& packed, const ExpertPhase& phase);

}  // namespace marlinq::cuda
