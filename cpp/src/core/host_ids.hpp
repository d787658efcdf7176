// Ids and tile lists in host memory, read with a check of each: what they hold can only be checked where
// the host sees it. Shapes and dtypes have been checked before.
#pragma once

#include <cstdint>

#include "core/concat.hpp"
#include "core/elements.hpp"
#include "core/refuse.hpp"
#include "marlinq/linear.hpp"
#include "marlinq/types.hpp"

namespace marlinq {

/// An element of topk_ids: -1 to num_experts - 1. Throws invalid_argument.
inline std::int64_t checked_topk_id(const ConstMatrixView& topk_ids, std::int64_t row,
                                    std::int64_t column, std::int64_t num_experts) {
  const std::int64_t id =
      read_integer(topk_ids.data, topk_ids.dtype, row * topk_ids.row_stride + column);
  if (id < -1 || id >= num_experts) {
    refuse_argument(concat("topk_ids: element [", row, ", ", column, "] is ", id,
                           ", expected -1 to ", num_experts - 1));
  }
  return id;
}

/// What num_tokens_past_padded holds has to be whole tiles that are there. Throws invalid_argument.
inline void check_tile_entries(std::int64_t entries, const FusedTiles& tiles) {
  if (entries < 0 || entries % tiles.block_size != 0 || entries > tiles.sorted_token_ids.size ||
      entries / tiles.block_size > tiles.expert_ids.size) {
    refuse_argument(concat("num_tokens_past_padded: ", entries,
                           ", expected a multiple of block_size = ", tiles.block_size,
                           " within sorted_token_ids (", tiles.sorted_token_ids.size,
                           ") and expert_ids (", tiles.expert_ids.size, ")"));
  }
}

/// How many entries of the tiles count. Throws invalid_argument.
inline std::int64_t checked_tile_entries(const FusedTiles& tiles) {
  const std::int64_t entries =
      read_integer(tiles.num_tokens_past_padded.data, tiles.num_tokens_past_padded.dtype, 0);
  check_tile_entries(entries, tiles);
  return entries;
}

/// The expert of a tile, -1 to num_experts - 1. Throws invalid_argument.
inline std::int64_t checked_tile_expert(const FusedTiles& tiles, std::int64_t tile,
                                        std::int64_t num_experts) {
  const std::int64_t expert = read_integer(tiles.expert_ids.data, tiles.expert_ids.dtype, tile);
  if (expert < -1 || expert >= num_experts) {
    refuse_argument(concat("expert_ids: element [", tile, "] is ", expert, ", expected -1 to ",
                           num_experts - 1));
  }
  return expert;
}

/// The id of an entry, at least 0; padding is what is num_tokens * top_k or more. Throws
/// invalid_argument.
inline std::int64_t checked_tile_id(const FusedTiles& tiles, std::int64_t entry) {
  const std::int64_t id =
      read_integer(tiles.sorted_token_ids.data, tiles.sorted_token_ids.dtype, entry);
  if (id < 0) {
    refuse_argument(
        concat("sorted_token_ids: element [", entry, "] is ", id, ", expected at least 0"));
  }
  return id;
}

}  // namespace marlinq
