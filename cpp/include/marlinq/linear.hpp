// What a loaded weight can do: Linear and MarlinExpertStack of a backend B.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "marlinq/types.hpp"

namespace marlinq {

/// What was chosen at load, the same for every backend.
struct Description {
  std::string backend;
  std::string device;
  std::string arch;      // instruction set or GPU architecture
  std::string kernel;    // the name that LoadOptions::kernel takes
  std::string compute;   // arithmetic; "a or b" where the type of the activations decides
  std::string schedule;  // how work is split
  int bits = 0;
  std::int64_t group_size = 0;
  std::int64_t k = 0;
  std::int64_t n = 0;         // per expert
  std::int64_t k_padded = 0;  // the most of all modules
  std::int64_t n_padded = 0;
  std::int64_t num_experts = 1;
  std::vector<std::int64_t> fused;  // n of each module
  bool symmetric = false;
  bool act_order = false;
  bool bias = false;
  bool batch_invariant = false;
  std::string zero_points;            // "v1", "v2" or "mixed"
  std::string scale_dtype;            // of the checkpoint
  std::int64_t packed_bytes = 0;      // of the weight as held
  std::int64_t checkpoint_bytes = 0;  // of the tensors it came from
  std::vector<std::string> warnings;
};

/// A quantised linear layer, y = x W^T + bias. Immutable and shared by any number of contexts.
template <class B>
class Linear {
 public:
  virtual ~Linear() = default;

  virtual std::int64_t in_features() const noexcept = 0;
  virtual std::int64_t out_features() const noexcept = 0;

  /// Appends the product of the first m rows to the context's stream: input [m, K] f32, f16 or
  /// bf16, output [m, N] of the input's dtype or f32. Throws invalid_argument for views that do not
  /// fit.
  virtual void forward(typename B::Context& context, const ConstMatrixView& input,
                       const MatrixView& output, std::int64_t m) const = 0;

  virtual Description describe() const = 0;
};

/// `rows` consecutive rows of the input through one expert into consecutive rows of the output.
struct ExpertDispatch {
  std::int32_t expert = 0;
  std::int64_t input_row = 0;
  std::int64_t output_row = 0;
  std::int64_t rows = 0;
};

/// Tiles as moe_align_block_size makes them. Entry i of `sorted_token_ids` is an id: its input row
/// is id / top_k and its output row is id; an id of num_tokens * top_k or more is padding. Tile i
/// holds block_size entries, for the expert expert_ids[i]; -1 means "not here": zeros are written.
struct FusedTiles {
  ConstArrayView sorted_token_ids;        // i32
  ConstArrayView expert_ids;              // i32, one a tile
  ConstArrayView num_tokens_past_padded;  // i32 [1]: how many entries count
  int block_size = 16;                    // 8, 16, 32, 48 or 64
  int top_k = 1;
  std::int64_t num_tokens = 0;
  /// f32 [num_tokens * top_k]: each output row is multiplied by its weight, bias included.
  std::optional<ConstArrayView> topk_weights;
};

/// The weights of all experts of one projection; each expert's packed bytes are contiguous.
template <class B>
class MarlinExpertStack {
 public:
  virtual ~MarlinExpertStack() = default;

  virtual std::int64_t num_experts() const noexcept = 0;
  virtual std::int64_t k() const noexcept = 0;
  virtual std::int64_t n_per_expert() const noexcept = 0;

  /// A view of one expert that shares the stack's memory. Throws invalid_argument.
  virtual std::shared_ptr<const Linear<B>> expert(std::int64_t index) const = 0;

  /// Runs every dispatch in one launch. Dispatches may come in any order; rows of the output that
  /// none names are left alone, and two that name the same output row are the caller's mistake.
  virtual void gemm_phase_batched(typename B::Context& context, const ConstMatrixView& input,
                                  std::span<const ExpertDispatch> dispatches,
                                  const MatrixView& output) const = 0;

  /// Runs every tile in one launch. Output rows need no zeroing beforehand.
  virtual void gemm_phase_fused(typename B::Context& context, const ConstMatrixView& input,
                                const FusedTiles& tiles, const MatrixView& output) const = 0;

  virtual Description describe() const = 0;
};

}  // namespace marlinq
