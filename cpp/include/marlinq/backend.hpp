// The backend trait: what a type must offer to run GPTQ layers, and the defaults for what it does
// not.
#pragma once

#include <concepts>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "marlinq/error.hpp"
#include "marlinq/gptq.hpp"
#include "marlinq/linear.hpp"
#include "marlinq/load_options.hpp"
#include "marlinq/moe_block.hpp"
#include "marlinq/routing.hpp"
#include "marlinq/types.hpp"

namespace marlinq {

/// An empty struct that names a backend. Context: device, stream and scratch, used by one thread at
/// a time. Buffer: memory that knows its device, dtype and length.
template <class B>
concept Backend = std::is_empty_v<B> &&
                  requires(const typename B::Context& context, const typename B::Buffer& buffer) {
                    { B::kName } -> std::convertible_to<std::string_view>;
                    { context.device() } -> std::same_as<Device>;
                    { buffer.device() } -> std::same_as<Device>;
                    { buffer.dtype() } -> std::same_as<DType>;
                    { buffer.size() } -> std::same_as<std::int64_t>;
                  };

/// The capability that the handles need. QuantMarlinDefaults gives all of it.
template <class B>
concept BackendQuantMarlin =
    Backend<B> &&
    requires(typename B::Context& context, const GptqTensors& layer,
             std::span<const GptqTensors> experts, const GptqSpec& spec, const LoadOptions& options,
             std::int64_t elements, const MoeBlockParts<B>& parts, const ConstMatrixView& in,
             const MatrixView& out, const RouteOptions& route_options,
             std::span<const std::int32_t> expert_map) {
      { B::load_gptq(context, layer, spec, options) } -> std::same_as<std::unique_ptr<Linear<B>>>;
      {
        B::load_gptq_stacked(context, experts, spec, options)
      } -> std::same_as<std::shared_ptr<MarlinExpertStack<B>>>;
      { B::pregrow_marlin_gather_scratch(context, elements) } -> std::same_as<void>;
      { B::make_moe_block(context, parts) } -> std::same_as<std::unique_ptr<MoeBlock<B>>>;
      { B::route(context, in, route_options, out, out) } -> std::same_as<void>;
    };

/// Derive a backend from QuantMarlinDefaults<Itself> and declare the same static functions for what
/// it can do; the rest raises `unsupported` and names the backend and the operation.
template <class B>
struct QuantMarlinDefaults {
  /// Loads one layer. Throws invalid_argument for tensors that do not fit.
  template <class Context>
  static std::unique_ptr<Linear<B>> load_gptq(Context&, const GptqTensors&, const GptqSpec&,
                                              const LoadOptions&) {
    unsupported("load_gptq");
  }

  /// Loads one layer per expert, all of one shape; `spec.n` is per expert.
  template <class Context>
  static std::shared_ptr<MarlinExpertStack<B>> load_gptq_stacked(Context&,
                                                                 std::span<const GptqTensors>,
                                                                 const GptqSpec&,
                                                                 const LoadOptions&) {
    unsupported("load_gptq_stacked");
  }

  /// Grows the context's scratch to `required_elements` = m_total * (widest matmul input), so that
  /// forwards of linears and stacks up to there allocate nothing. Idempotent; only ever grows.
  template <class Context>
  static void pregrow_marlin_gather_scratch(Context&, std::int64_t /*required_elements*/) {}

  template <class Context>
  static std::unique_ptr<MoeBlock<B>> make_moe_block(Context&, const MoeBlockParts<B>&) {
    unsupported("make_moe_block");
  }

  /// marlinq::route on the backend's own memory.
  template <class Context>
  static void route(Context&, const ConstMatrixView&, const RouteOptions&, const MatrixView&,
                    const MatrixView&) {
    unsupported("route");
  }

 private:
  [[noreturn]] static void unsupported(std::string_view operation) {
    throw Error(ErrorCode::kUnsupported, std::string("backend '") + std::string(B::kName) +
                                             "' does not support " + std::string(operation));
  }
};

}  // namespace marlinq
