// Tokens sorted by expert on the device: the padded lists of moe_align_block_size, and the tiles of
// a MoE block. Each is one launch of one block, stable in order, and reads nothing back.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/integers.hpp"
#include "cuda/moe/operands.hpp"

namespace marlinq::cuda {

/// What the tiles of sort_by_expert are at most, for so many ids.
constexpr std::int64_t most_expert_tiles(std::int64_t ids, std::int64_t num_experts,
                                         std::int64_t max_rows) noexcept {
  return ids / max_rows + std::min(num_experts, ids);
}

/// Tiles of so many rows at most are walked through in runs.
constexpr std::int32_t kMixedRows = 8;

/// Where the ids of each expert are, in device memory of the caller. A tile is up to max_rows
/// neighbours in `ids` that have one expert. Full tiles come first, by expert; then what is left of
/// each expert, by falling eighths of max_rows and by expert, so that blocks that take tiles in turn have as
/// much to do, but with up to kMixedRows rows by expert alone: where blocks take runs of tiles, the large ones are not
/// to stand together. Nothing is written past the end of what counts.
struct ExpertTiles {
  std::int32_t* ids = nullptr;      // [tokens * top_k]: t * top_k + s, by expert, without the -1s
  std::int32_t* experts = nullptr;  // [most_expert_tiles]
  std::int32_t* first = nullptr;    // [most_expert_tiles]: index into ids
  std::int32_t* rows = nullptr;     // [most_expert_tiles]: 1 to max_rows
  std::int32_t* count = nullptr;    // [1]: tiles
};

/// Sorts the ids by expert. num_experts 1 to 1024; max_rows a multiple of 8 up to 128. `dependent_launch` as in
/// GemmPlan. No ids: count is 0.
void sort_by_expert(const TopkIds& topk_ids, std::int32_t num_experts, std::int32_t max_rows,
                    const ExpertTiles& tiles, bool dependent_launch, void* stream);

/// The lists of marlinq::moe_align_block_size in device memory of the caller, with room for any
/// routing (most_aligned_ids). The entries past the end of what counts are padding: the id
/// tokens * top_k, and the expert -1.
struct AlignedTiles {
  std::int32_t* sorted_token_ids = nullptr;
  std::int64_t sorted_size = 0;
  std::int32_t* expert_ids = nullptr;
  std::int64_t expert_size = 0;
  std::int32_t* num_tokens_past_padded = nullptr;  // [1]
};

/// What each expert is called, [num_experts]: null, on the device, or on the host, where it is read
/// before the call returns.
struct ExpertMap {
  const std::int32_t* data = nullptr;
  bool on_host = false;
};

void align_block_size(const TopkIds& topk_ids, std::int32_t block_size, std::int32_t num_experts,
                      const ExpertMap& expert_map, const AlignedTiles& tiles, bool dependent_launch,
                      void* stream);

}  // namespace marlinq::cuda
