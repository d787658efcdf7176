// The backend trait: what a type must offer to run GPTQ layers, and the defaults for what it does
// not.
#pragma once

#include <concepts>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "marlinq/error.hpp"
#include "marlinq/gptq.hpp"
#include "marlinq/linear.hpp"
#include "marlinq/load_options.hpp"
#include "marlinq/moe_block.hpp"
#include "marlinq/routing.hpp"
#include "marlinq/schedules.hpp"
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
    Backend<B> && std::default_initializable<typename B::Buffer> &&
    std::movable<typename B::Buffer> &&
    requires(typename B::Context& context, typename B::Buffer& buffer, const GptqTensors& layer,
             std::span<const GptqTensors> experts, const GptqSpec& spec, const LoadOptions& options,
             std::int64_t elements, const MoeBlockParts<B>& parts, const ConstMatrixView& in,
             const MatrixView& out, const RouteOptions& route_options,
             const ConstArrayView& expert_map, const ArrayView& list, int count, DType dtype,
             const Linear<B>& linear, std::span<const std::int64_t> rows) {
      { B::load_gptq(context, layer, spec, options) } -> std::same_as<std::unique_ptr<Linear<B>>>;
      {
        B::load_gptq_stacked(context, experts, spec, options)
      } -> std::same_as<std::shared_ptr<MarlinExpertStack<B>>>;
      { B::pregrow_marlin_gather_scratch(context, elements) } -> std::same_as<void>;
      { B::make_moe_block(context, parts) } -> std::same_as<std::unique_ptr<MoeBlock<B>>>;
      { B::route(context, in, route_options, out, out) } -> std::same_as<void>;
      {
        B::moe_align_block_size(context, in, count, count, expert_map, list, list, list)
      } -> std::same_as<void>;
      { B::allocate(context, dtype, elements) } -> std::same_as<typename B::Buffer>;
      { buffer.data() } -> std::same_as<void*>;
      { B::copy(context, in, out) } -> std::same_as<void>;
      { B::synchronise(context) } -> std::same_as<void>;
      { B::captured(context) } -> std::same_as<bool>;
      { B::tune(context, linear, rows, dtype) } -> std::same_as<std::vector<TunedSchedule>>;
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
  /// For blocks on a GPU, 2 * tokens * top_k * (hidden + inner).
  template <class Context>
  static void pregrow_marlin_gather_scratch(Context&, std::int64_t /*required_elements*/) {}

  template <class Context>
  static std::unique_ptr<MoeBlock<B>> make_moe_block(Context&, const MoeBlockParts<B>&) {
    unsupported("make_moe_block");
  }

  /// marlinq::route on the backend's own memory. A GPU scores in float32: experts whose scores differ
  /// by less than that can tell may come in another order than on the CPU.
  template <class Context>
  static void route(Context&, const ConstMatrixView&, const RouteOptions&, const MatrixView&,
                    const MatrixView&) {
    unsupported("route");
  }

  /// marlinq::moe_align_block_size on the backend's own memory: topk_ids, block_size, num_experts,
  /// expert_map (i32 [num_experts], there or on the host; size 0: none), and the lists that are
  /// written: sorted_token_ids (i32, most_aligned_ids entries or more), expert_ids (i32, one for each
  /// block_size of these or more) and num_tokens_past_padded (i32 [1]). Entries past the end of what
  /// counts are padding: the id T * top_k, and the expert -1. On a GPU, where ids are not read by the
  /// host, those out of range count as -1. Throws invalid_argument.
  template <class Context>
  static void moe_align_block_size(Context&, const ConstMatrixView&, int, int,
                                   const ConstArrayView&, const ArrayView&, const ArrayView&,
                                   const ArrayView&) {
    unsupported("moe_align_block_size");
  }

  /// Zeroed memory on the context's device. Throws out_of_memory.
  template <class Context, class Backend = B>
  static typename Backend::Buffer allocate(Context&, DType, std::int64_t) {
    unsupported("allocate");
  }

  /// Appends a copy of all rows to the context's stream. Both matrices are of one size and dtype,
  /// each in host memory or on the context's device; where one is in host memory, the copy is done
  /// on return. Throws invalid_argument.
  template <class Context>
  static void copy(Context&, const ConstMatrixView&, const MatrixView&) {
    unsupported("copy");
  }

  /// Returns when the work of the context's stream is done. Throws invalid_argument where it cannot
  /// be waited for.
  template <class Context>
  static void synchronise(Context&) {
    unsupported("synchronise");
  }

  /// Whether a CUDA graph uses memory of the context.
  template <class Context>
  static bool captured(Context&) noexcept {
    return false;
  }

  /// Measures how a layer runs quickest, for each of `rows` (ascending, at least 1) and the dtype of x (f16 or bf16): an
  /// entry for each of them and each run of modules with one row order, from the rows before + 1 on. Takes seconds, some
  /// hundred MB of the device and nothing else that runs there. Throws invalid_argument or out_of_memory.
  template <class Context>
  static std::vector<TunedSchedule> tune(Context&, const Linear<B>&, std::span<const std::int64_t>,
                                         DType) {
    unsupported("tune");
  }

 private:
  [[noreturn]] static void unsupported(std::string_view operation) {
    throw Error(ErrorCode::kUnsupported, std::string("backend '") + std::string(B::kName) +
                                             "' does not support " + std::string(operation));
  }
};

}  // namespace marlinq
