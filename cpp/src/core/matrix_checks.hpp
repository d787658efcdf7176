// Checks of the views that a forward receives; every backend uses these, so messages are the same
// everywhere.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <string_view>

#include "core/concat.hpp"
#include "core/elements.hpp"
#include "core/integers.hpp"
#include "core/refuse.hpp"
#include "marlinq/error.hpp"
#include "marlinq/linear.hpp"
#include "marlinq/moe_block.hpp"
#include "marlinq/types.hpp"

namespace marlinq {

inline void check_alignment(const void* data, DType dtype, std::string_view name) {
  if (reinterpret_cast<std::uintptr_t>(data) % size_of(dtype) != 0) {
    refuse_argument(concat(name, ": address not a multiple of ", size_of(dtype), ", the size of ",
                           to_string(dtype)));
  }
}

template <class View>
void check_matrix(const View& view, std::string_view name, Device device, std::int64_t min_rows,
                  std::int64_t cols) {
  if (view.device != device) {
    refuse_argument(
        concat(name, ": on ", to_string(view.device), ", expected ", to_string(device)));
  }
  if (view.cols != cols) {
    refuse_argument(concat(name, ": ", view.cols, " columns, expected ", cols));
  }
  if (view.rows < min_rows) {
    refuse_argument(concat(name, ": ", view.rows, " rows, expected at least ", min_rows));
  }
  if (view.rows > 1 && view.row_stride < view.cols) {
    refuse_argument(
        concat(name, ": row stride ", view.row_stride, ", expected at least ", view.cols));
  }
  if (view.data == nullptr && view.rows > 0 && view.cols > 0) {
    refuse_argument(concat(name, ": null data"));
  }
  check_alignment(view.data, view.dtype, name);
}

inline void check_input(const ConstMatrixView& view, std::string_view name, Device device,
                        std::int64_t min_rows, std::int64_t cols) {
  if (!is_floating(view.dtype)) {
    refuse_argument(
        concat(name, ": dtype ", to_string(view.dtype), ", expected float32, float16 or bfloat16"));
  }
  check_matrix(view, name, device, min_rows, cols);
}

/// What is of the input's dtype or float32: outputs, and what is added to them.
template <class View>
void check_output(const View& view, std::string_view name, Device device, std::int64_t min_rows,
                  std::int64_t cols, DType input) {
  if (view.dtype != input && view.dtype != DType::kFloat32) {
    refuse_argument(concat(name, ": dtype ", to_string(view.dtype), ", expected the input's ",
                           to_string(input), input == DType::kFloat32 ? "" : " or float32"));
  }
  check_matrix(view, name, device, min_rows, cols);
}

/// The two sides of a copy: of one size and dtype, each on `device` or in host memory.
inline void check_copy(const ConstMatrixView& from, const MatrixView& to, Device device) {
  const auto check = [device](const auto& view, std::string_view name, const auto& like) {
    if (view.dtype != like.dtype) {
      refuse_argument(
          concat(name, ": dtype ", to_string(view.dtype), ", expected ", to_string(like.dtype)));
    }
    check_matrix(view, name, view.device == Device{} ? view.device : device, like.rows, like.cols);
  };
  check(from, "from", to);
  check(to, "to", from);
}

inline void check_array(const ConstArrayView& view, std::string_view name, Device device,
                        DType dtype, std::int64_t min_size) {
  if (view.device != device) {
    refuse_argument(
        concat(name, ": on ", to_string(view.device), ", expected ", to_string(device)));
  }
  if (view.dtype != dtype) {
    refuse_argument(
        concat(name, ": dtype ", to_string(view.dtype), ", expected ", to_string(dtype)));
  }
  if (view.size < min_size) {
    refuse_argument(concat(name, ": ", view.size, " elements, expected at least ", min_size));
  }
  if (view.data == nullptr && view.size > 0) refuse_argument(concat(name, ": null data"));
  check_alignment(view.data, view.dtype, name);
}

inline void check_context(Device context, Device weight) {
  if (context != weight) {
    refuse_argument(concat("context: on ", to_string(context), ", expected ", to_string(weight)));
  }
}

inline void check_rows(std::int64_t m) {
  if (m < 0) refuse_argument(concat("m: ", m, ", expected at least 0"));
}

inline void check_dispatch(const ExpertDispatch& dispatch, std::size_t index,
                           std::int64_t num_experts, std::int64_t input_rows,
                           std::int64_t output_rows) {
  if (dispatch.expert < 0 || dispatch.expert >= num_experts) {
    refuse_argument(concat("dispatches[", index, "]: expert ", dispatch.expert, ", expected 0 to ",
                           num_experts - 1));
  }
  const auto check_range = [&](std::string_view what, std::int64_t first, std::int64_t available) {
    if (first < 0 || dispatch.rows < 0 || first > available || dispatch.rows > available - first) {
      refuse_argument(concat("dispatches[", index, "]: ", what, " rows ", first, " + ",
                             dispatch.rows, " of ", available));
    }
  };
  check_range("input", dispatch.input_row, input_rows);
  check_range("output", dispatch.output_row, output_rows);
}

constexpr bool is_tile_size(int block_size) noexcept {
  return block_size == 8 || block_size == 16 || block_size == 32 || block_size == 48 ||
         block_size == 64;
}

inline void check_tile_size(int block_size) {
  if (!is_tile_size(block_size)) {
    refuse_argument(concat("block_size: ", block_size, ", expected 8, 16, 32, 48 or 64"));
  }
}

/// Everything about the tiles that needs no look at their contents.
inline void check_tiles(const FusedTiles& tiles, Device device) {
  check_tile_size(tiles.block_size);
  if (tiles.top_k < 1) refuse_argument(concat("top_k: ", tiles.top_k, ", expected at least 1"));
  constexpr std::int64_t kMaxIds = std::numeric_limits<std::int32_t>::max();
  if (tiles.num_tokens > kMaxIds / tiles.top_k) {
    refuse_argument(concat("num_tokens: ", tiles.num_tokens, ", expected at most ",
                           kMaxIds / tiles.top_k, " with top_k = ", tiles.top_k));
  }
  if (tiles.num_tokens < 0)
    refuse_argument(concat("num_tokens: ", tiles.num_tokens, ", expected at least 0"));
  check_array(tiles.sorted_token_ids, "sorted_token_ids", device, DType::kInt32, 0);
  check_array(tiles.expert_ids, "expert_ids", device, DType::kInt32, 0);
  check_array(tiles.num_tokens_past_padded, "num_tokens_past_padded", device, DType::kInt32, 1);
  if (tiles.topk_weights) {
    check_array(*tiles.topk_weights, "topk_weights", device, DType::kFloat32,
                tiles.num_tokens * tiles.top_k);
  }
}

/// Everything about a batched call. Throws invalid_argument.
inline void check_batched(const ConstMatrixView& input, std::span<const ExpertDispatch> dispatches,
                          const MatrixView& output, Device device, std::int64_t num_experts,
                          std::int64_t k, std::int64_t n) {
  check_input(input, "x", device, 0, k);
  check_output(output, "out", device, 0, n, input.dtype);
  for (std::size_t i = 0; i < dispatches.size(); ++i) {
    check_dispatch(dispatches[i], i, num_experts, input.rows, output.rows);
  }
}

/// Everything about a fused call that needs no look at the tiles' contents. Throws invalid_argument.
inline void check_fused(const ConstMatrixView& input, const FusedTiles& tiles,
                        const MatrixView& output, Device device, std::int64_t k, std::int64_t n) {
  check_tiles(tiles, device);
  check_input(input, "x", device, tiles.num_tokens, k);
  check_output(output, "out", device, tiles.num_tokens * tiles.top_k, n, input.dtype);
}

}  // namespace marlinq
