// moe_align_block_size into lists that a context keeps.
#pragma once

#include <cstdint>
#include <span>

#include "marlinq/routing.hpp"

namespace marlinq {

/// As moe_align_block_size, reusing the memory of `tiles`.
void align_tokens(const ConstMatrixView& topk_ids, int block_size, int num_experts,
                  std::span<const std::int32_t> expert_map, TokenTiles& tiles);

}  // namespace marlinq
