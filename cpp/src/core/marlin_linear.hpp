// Linear and MarlinExpertStack over a backend's packed weight, written once for every backend that
// offers the primitives of PackedGemm. Views are checked here; a primitive checks only what needs a
// look at the device's memory.
#pragma once

#include <concepts>
#include <cstdint>
#include <memory>
#include <span>

#include "core/matrix_checks.hpp"
#include "marlinq/backend.hpp"

namespace marlinq {

/// What the classes below need of a backend. `Packed` is the weight of all
/// experts of one projection (a plain linear is a stack of one) in the backend's own tile order,
/// immutable.
template <class B>
concept PackedGemm =
    Backend<B> &&
    requires(typename B::Context& context, const typename B::Packed& packed, std::int64_t index,
             const ConstMatrixView& input, const MatrixView& output,
             std::span<const ExpertDispatch> dispatches, const FusedTiles& tiles) {
      { B::gemm(context, packed, index, input, output, index) } -> std::same_as<void>;
      { B::gemm_batched(context, packed, input, dispatches, output) } -> std::same_as<void>;
      { B::gemm_fused(context, packed, input, tiles, output) } -> std::same_as<void>;
      { B::describe(packed) } -> std::same_as<Description>;         // of the whole stack
      { B::describe(packed, index) } -> std::same_as<Description>;  // of one expert
      { packed.num_experts() } -> std::same_as<std::int64_t>;
      { packed.k() } -> std::same_as<std::int64_t>;
      { packed.n() } -> std::same_as<std::int64_t>;
    };

/// Refuses a context of another device than the weight's, where weights know theirs.
template <PackedGemm B>
void check_context_of(const typename B::Context& context, const typename B::Packed& packed) {
  if constexpr (requires { packed.device(); }) check_context(context.device(), packed.device());
}

/// One expert of a packed weight, as a linear layer that shares its memory.
template <PackedGemm B>
class MarlinLinear final : public Linear<B> {
 public:
  MarlinLinear(std::shared_ptr<const typename B::Packed> packed, std::int64_t expert)
      : packed_(std::move(packed)), expert_(expert) {}

  std::int64_t in_features() const noexcept override { return packed_->k(); }
  std::int64_t out_features() const noexcept override { return packed_->n(); }

  void forward(typename B::Context& context, const ConstMatrixView& input, const MatrixView& output,
               std::int64_t m) const override {
    check_rows(m);
    check_context_of<B>(context, *packed_);
    check_input(input, "x", context.device(), m, packed_->k());
    check_output(output, "out", context.device(), m, packed_->n(), input.dtype);
    if (m > 0) B::gemm(context, *packed_, expert_, input, output, m);
  }

  Description describe() const override { return B::describe(*packed_, expert_); }

  const typename B::Packed& packed() const noexcept { return *packed_; }
  std::int64_t expert() const noexcept { return expert_; }

 private:
  std::shared_ptr<const typename B::Packed> packed_;
  std::int64_t expert_;
};

template <PackedGemm B>
class MarlinExpertStackImpl final : public MarlinExpertStack<B> {
 public:
  explicit MarlinExpertStackImpl(std::shared_ptr<const typename B::Packed> packed)
      : packed_(std::move(packed)) {}

  std::int64_t num_experts() const noexcept override { return packed_->num_experts(); }
  std::int64_t k() const noexcept override { return packed_->k(); }
  std::int64_t n_per_expert() const noexcept override { return packed_->n(); }

  std::shared_ptr<const Linear<B>> expert(std::int64_t index) const override {
    if (index < 0 || index >= num_experts()) {
      refuse_argument(concat("expert: ", index, ", expected 0 to ", num_experts() - 1));
    }
    return std::make_shared<MarlinLinear<B>>(packed_, index);
  }

  void gemm_phase_batched(typename B::Context& context, const ConstMatrixView& input,
                          std::span<const ExpertDispatch> dispatches,
                          const MatrixView& output) const override {
    check_context_of<B>(context, *packed_);
    check_batched(input, dispatches, output, context.device(), num_experts(), k(), n_per_expert());
    if (!dispatches.empty()) B::gemm_batched(context, *packed_, input, dispatches, output);
  }

  void gemm_phase_fused(typename B::Context& context, const ConstMatrixView& input,
                        const FusedTiles& tiles, const MatrixView& output) const override {
    check_context_of<B>(context, *packed_);
    check_fused(input, tiles, output, context.device(), k(), n_per_expert());
    if (tiles.num_tokens > 0) B::gemm_fused(context, *packed_, input, tiles, output);
  }

  Description describe() const override { return B::describe(*packed_); }

  const typename B::Packed& packed() const noexcept { return *packed_; }

 private:
  std::shared_ptr<const typename B::Packed> packed_;
};

}  // namespace marlinq
