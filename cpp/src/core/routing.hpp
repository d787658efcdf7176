// What the routing of every backend shares: the checks, and lists that a context keeps.
#pragma once

#include <cstdint>
#include <span>

#include "core/refuse.hpp"
#include "marlinq/routing.hpp"

namespace marlinq {

/// Everything about the arguments of route on a device that needs no look at the logits. Throws
/// invalid_argument.
void check_route(const ConstMatrixView& logits, const RouteOptions& options, const MatrixView& ids,
                 const MatrixView& weights, Device device);

inline void check_num_experts(int num_experts) {
  if (num_experts < 1 || num_experts > kMaxExperts) {
    refuse_argument(concat("num_experts: ", num_experts, ", expected 1 to ", kMaxExperts));
  }
}

/// Everything about the arguments of moe_align_block_size with lists on a device that needs no look at
/// the ids. Throws invalid_argument.
void check_align(const ConstMatrixView& topk_ids, int block_size, int num_experts,
                 const ConstArrayView& expert_map, const ArrayView& sorted_token_ids,
                 const ArrayView& expert_ids, const ArrayView& num_tokens_past_padded,
                 Device device);

/// As moe_align_block_size, reusing the memory of `tiles`.
void align_tokens(const ConstMatrixView& topk_ids, int block_size, int num_experts,
                  std::span<const std::int32_t> expert_map, TokenTiles& tiles);

}  // namespace marlinq
