// Arrays in host memory for a backend whose memory is elsewhere: copied to buffers of a context, and
// back.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>

#include "core/host_ids.hpp"
#include "core/integers.hpp"
#include "core/matrix_checks.hpp"
#include "core/moe_block_over_phases.hpp"
#include "marlinq/backend.hpp"

namespace marlinq::detail {

/// Buffers that only grow, one for each role of an array in a call. Any view of a call may be of host
/// memory; the others are on the context's device. Calls return when the stream is done.
template <BackendQuantMarlin B>
class HostStaging {
 public:
  using Context = typename B::Context;

  std::int64_t allocations() const noexcept { return allocations_; }

  /// Runs the first m rows.
  void forward(Context& context, const Linear<B>& linear, const ConstMatrixView& input,
               const MatrixView& output, std::int64_t m) {
    const Device device = context.device();
    check_rows(m);
    check_input(there(input, device), "x", device, m, linear.in_features());
    check_output(there(output, device), "out", device, m, linear.out_features(), input.dtype);
    B::synchronise(context);
    const ConstMatrixView x = bring(context, Role::kInput, first_rows(input, m));
    const MatrixView y = room_for(context, first_rows(output, m));
    linear.forward(context, x, y, m);
    take_back(context, y, first_rows(output, m));
  }

  void gemm_phase_batched(Context& context, const MarlinExpertStack<B>& stack,
                          const ConstMatrixView& input, std::span<const ExpertDispatch> dispatches,
                          const MatrixView& output) {
    const Device device = context.device();
    check_batched(there(input, device), dispatches, there(output, device), device,
                  stack.num_experts(), stack.k(), stack.n_per_expert());
    B::synchronise(context);
    const ConstMatrixView x = bring(context, Role::kInput, input);
    const MatrixView y = filled_room_for(context, output);
    stack.gemm_phase_batched(context, x, dispatches, y);
    take_back(context, y, output);
  }

  void gemm_phase_fused(Context& context, const MarlinExpertStack<B>& stack,
                        const ConstMatrixView& input, const FusedTiles& tiles,
                        const MatrixView& output) {
    const Device device = context.device();
    check_fused(there(input, device), there(tiles, device), there(output, device), device,
                stack.k(), stack.n_per_expert());
    check_contents(tiles, stack.num_experts());
    B::synchronise(context);
    const ConstMatrixView x = bring(context, Role::kInput, first_rows(input, tiles.num_tokens));
    FusedTiles brought = tiles;
    brought.sorted_token_ids = bring(context, Role::kIds, tiles.sorted_token_ids);
    brought.expert_ids = bring(context, Role::kExperts, tiles.expert_ids);
    brought.num_tokens_past_padded = bring(context, Role::kCount, tiles.num_tokens_past_padded);
    if (tiles.topk_weights) {
      brought.topk_weights = bring(context, Role::kWeights, *tiles.topk_weights);
    }
    const MatrixView rows = first_rows(output, tiles.num_tokens * tiles.top_k);
    const MatrixView y = filled_room_for(context, rows);
    stack.gemm_phase_fused(context, x, brought, y);
    take_back(context, y, rows);
  }

  void forward(Context& context, const MoeBlock<B>& block, const MoeInput& input,
               const MatrixView& output) {
    const Device device = context.device();
    // The block itself knows whether it runs a shared expert.
    check_moe_input(there(input, device), there(output, device), device, block.hidden_size(),
                    false);
    check_contents(input.topk_ids, block.num_experts());
    B::synchronise(context);
    MoeInput brought{.x = bring(context, Role::kInput, input.x),
                     .topk_ids = bring(context, Role::kIds, input.topk_ids),
                     .topk_weights = bring(context, Role::kWeights, input.topk_weights),
                     .shared_output = std::nullopt,
                     .residual = std::nullopt};
    if (input.shared_output) {
      brought.shared_output = bring(context, Role::kShared, *input.shared_output);
    }
    if (input.residual) brought.residual = bring(context, Role::kResidual, *input.residual);
    const MatrixView rows = first_rows(output, input.x.rows);
    const MatrixView y = room_for(context, rows);
    block.forward(context, brought, y);
    take_back(context, y, rows);
  }

 private:
  enum class Role : std::uint8_t {
    kInput,
    kOutput,
    kIds,
    kExperts,
    kCount,
    kWeights,
    kShared,
    kResidual,
    kNumber
  };
  static constexpr std::int64_t kRowAlignment =
      16;  // elements; rows of any dtype start at 16 bytes

  template <class View>
  static bool on_host(const View& view) {
    return view.device.kind == DeviceKind::kCpu;
  }

  template <class View>
  static View first_rows(View view, std::int64_t m) {
    view.rows = m;
    return view;
  }

  // What a view will be on the device, so that everything is checked before anything is copied.
  template <class View>
  static View there(View view, Device device) {
    if (on_host(view)) view.device = device;
    return view;
  }
  static FusedTiles there(FusedTiles tiles, Device device) {
    for (ConstArrayView* view :
         {&tiles.sorted_token_ids, &tiles.expert_ids, &tiles.num_tokens_past_padded}) {
      *view = there(*view, device);
    }
    if (tiles.topk_weights) tiles.topk_weights = there(*tiles.topk_weights, device);
    return tiles;
  }
  static MoeInput there(MoeInput input, Device device) {
    for (ConstMatrixView* view : {&input.x, &input.topk_ids, &input.topk_weights}) {
      *view = there(*view, device);
    }
    if (input.shared_output) input.shared_output = there(*input.shared_output, device);
    if (input.residual) input.residual = there(*input.residual, device);
    return input;
  }

  static void check_contents(const ConstMatrixView& topk_ids, std::int64_t num_experts) {
    if (!on_host(topk_ids)) return;
    for (std::int64_t row = 0; row < topk_ids.rows; ++row) {
      for (std::int64_t column = 0; column < topk_ids.cols; ++column) {
        checked_topk_id(topk_ids, row, column, num_experts);
      }
    }
  }
  // Of lists that are longer than their count only the beginning has to hold ids.
  static void check_contents(const FusedTiles& tiles, std::int64_t num_experts) {
    if (!on_host(tiles.num_tokens_past_padded)) return;
    const std::int64_t entries = checked_tile_entries(tiles);
    for (std::int64_t i = 0; on_host(tiles.expert_ids) && i < entries / tiles.block_size; ++i) {
      checked_tile_expert(tiles, i, num_experts);
    }
    for (std::int64_t i = 0; on_host(tiles.sorted_token_ids) && i < entries; ++i) {
      checked_tile_id(tiles, i);
    }
  }

  ConstMatrixView bring(Context& context, Role role, const ConstMatrixView& view) {
    if (!on_host(view)) return view;
    const MatrixView staged = place(context, role, view.dtype, view.rows, view.cols);
    B::copy(context, view, staged);
    return as_const(staged);
  }
  ConstArrayView bring(Context& context, Role role, const ConstArrayView& array) {
    if (!on_host(array) || array.size == 0) return there(array, context.device());
    const ConstMatrixView staged = bring(context, role,
                                         ConstMatrixView{.data = array.data,
                                                         .dtype = array.dtype,
                                                         .device = array.device,
                                                         .rows = 1,
                                                         .cols = array.size,
                                                         .row_stride = array.size});
    return {
        .data = staged.data, .dtype = staged.dtype, .device = staged.device, .size = array.size};
  }

  MatrixView room_for(Context& context, const MatrixView& output) {
    if (!on_host(output)) return output;
    return place(context, Role::kOutput, output.dtype, output.rows, output.cols);
  }
  /// With what is there, for calls that may leave rows alone.
  MatrixView filled_room_for(Context& context, const MatrixView& output) {
    const MatrixView staged = room_for(context, output);
    if (on_host(output)) B::copy(context, as_const(output), staged);
    return staged;
  }
  void take_back(Context& context, const MatrixView& staged, const MatrixView& output) {
    if (on_host(output)) B::copy(context, as_const(staged), output);
    B::synchronise(context);
  }

  MatrixView place(Context& context, Role role, DType dtype, std::int64_t rows, std::int64_t cols) {
    const std::int64_t stride = round_up(cols, kRowAlignment);
    if (rows > std::numeric_limits<std::int64_t>::max() / 8 / stride) {
      throw Error(ErrorCode::kOutOfMemory, concat("cannot allocate ", rows, " rows of ", cols));
    }
    // Held as 32-bit words, whatever they are used for.
    const std::int64_t words =
        ceil_div(rows * stride * static_cast<std::int64_t>(size_of(dtype)), std::int64_t{4});
    typename B::Buffer& buffer = buffers_[static_cast<std::size_t>(role)];
    if (buffer.size() < words) {
      buffer = B::allocate(context, DType::kInt32, words);
      ++allocations_;
    }
    return {.data = buffer.data(),
            .dtype = dtype,
            .device = context.device(),
            .rows = rows,
            .cols = cols,
            .row_stride = stride};
  }

  std::array<typename B::Buffer, static_cast<std::size_t>(Role::kNumber)> buffers_;
  std::int64_t allocations_ = 0;
};

}  // namespace marlinq::detail
