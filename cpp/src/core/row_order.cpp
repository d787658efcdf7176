#include "core/row_order.hpp"

#include <algorithm>

#include "core/integers.hpp"

namespace marlinq {

RowOrder make_row_order(std::span<const std::int32_t> group_of_row, std::int64_t groups,
                        int alignment, int max_block) {
  std::vector<std::int64_t> next(static_cast<std::size_t>(groups) + 1, 0);
  for (const std::int32_t group : group_of_row) ++next[static_cast<std::size_t>(group) + 1];
  RowOrder order;
  std::int64_t first = 0;
  for (std::int64_t group = 0; group < groups; ++group) {
    auto& count = next[static_cast<std::size_t>(group) + 1];
    const std::int64_t padded = round_up(count, alignment);
    for (std::int64_t row = 0; row < padded; row += max_block) {
      order.blocks.push_back(
          {.first = static_cast<std::int32_t>(first + row),
           .count = static_cast<std::int32_t>(std::min<std::int64_t>(max_block, padded - row)),
           .group = static_cast<std::int32_t>(group)});
    }
    next[static_cast<std::size_t>(group)] = first;
    first += padded;
  }
  order.source.assign(static_cast<std::size_t>(first), -1);
  for (std::size_t row = 0; row < group_of_row.size(); ++row) {
    const std::int64_t packed = next[static_cast<std::size_t>(group_of_row[row])]++;
    order.source[static_cast<std::size_t>(packed)] = static_cast<std::int32_t>(row);
    order.identity = order.identity && packed == static_cast<std::int64_t>(row);
  }
  return order;
}

}  // namespace marlinq
