// The order of the input rows inside a packed weight: rows of one group stand together, so that a
// kernel meets each group's scale once. Act-order becomes a permutation of the input's columns.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/row_block.hpp"

namespace marlinq {

struct RowOrder {
  /// Input row at each packed row, or -1 where a group was padded.
  std::vector<std::int32_t> source;
  std::vector<RowBlock> blocks;
  /// Packed row i is input row i for i < k, and only padding follows.
  bool identity = true;

  std::int64_t rows() const noexcept { return static_cast<std::int64_t>(source.size()); }

  friend bool operator==(const RowOrder&, const RowOrder&) = default;
};

/// Sorts rows by group, stable; pads each group to a multiple of `alignment` and cuts it into
/// blocks of at most `max_block` packed rows (a multiple of `alignment`).
RowOrder make_row_order(std::span<const std::int32_t> group_of_row, std::int64_t groups,
                        int alignment, int max_block);

}  // namespace marlinq
