// Routing of tokens to experts: top-k choice and tile lists, and their host implementations.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "marlinq/export.hpp"
#include "marlinq/types.hpp"

namespace marlinq {

inline constexpr int kMaxExperts = 1024;  // of a routing and of a MoE block
inline constexpr int kMaxTopK = 16;

enum class Scoring : std::uint8_t { kSoftmax, kSigmoid };

/// The inverse of "softmax" and "sigmoid". Throws invalid_argument.
MARLINQ_API Scoring parse_scoring(std::string_view text);

enum class Renormalise : std::uint8_t { kNo, kYes };

struct RouteOptions {
  int top_k = 1;  // 1 to 16
  Scoring scoring = Scoring::kSoftmax;
  Renormalise renormalise = Renormalise::kYes;  // divide the chosen weights by their sum
  /// f32 [E], finite, added to the scores for the choice alone (e_score_correction_bias); empty:
  /// none.
  std::span<const float> correction_bias = {};
  /// Experts come in num_groups equal groups; only the top_groups best may be chosen from. A
  /// group's score is its best expert, or the sum of its best two where there is a correction bias
  /// (DeepSeek-V3).
  int num_groups = 1;
  int top_groups = 1;
  float scale = 1.0F;  // the weights are multiplied by this at the end (routed_scaling_factor)
};

/// Chooses top_k experts for each row of logits [T, E] (f32, f16, bf16): ids i32 [T, top_k] by
/// falling score (equal scores: the lower index first), weights f32 [T, top_k]. Host memory only.
/// Throws invalid_argument.
MARLINQ_API void route(const ConstMatrixView& logits, const RouteOptions& options,
                       const MatrixView& ids, const MatrixView& weights);

/// How many entries of sorted_token_ids moe_align_block_size fills for so many ids at most, whatever
/// they are; a multiple of block_size.
constexpr std::int64_t most_aligned_ids(std::int64_t ids, int block_size,
                                        int num_experts) noexcept {
  const std::int64_t buckets = std::min<std::int64_t>(ids, std::int64_t{num_experts} + 1);
  return (ids + buckets * (block_size - 1)) / block_size * block_size;
}

/// Tile lists on the host; see FusedTiles for their meaning.
struct TokenTiles {
  std::vector<std::int32_t> sorted_token_ids;
  std::vector<std::int32_t> expert_ids;
  std::int32_t num_tokens_past_padded = 0;
};

/// Sorts the ids of topk_ids [T, top_k] (i32 or i64, values -1 to num_experts - 1) by expert,
/// stable, each expert padded to whole tiles with the id T * top_k; tiles of expert -1 come last.
/// A non-empty expert_map [num_experts] says what each tile's expert is called here, -1 for "not
/// here". num_experts 1 to 1024; block_size 8, 16, 32, 48 or 64. Host memory only. Throws
/// invalid_argument.
MARLINQ_API TokenTiles moe_align_block_size(const ConstMatrixView& topk_ids, int block_size,
                                            int num_experts,
                                            std::span<const std::int32_t> expert_map = {});

}  // namespace marlinq
