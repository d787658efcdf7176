#include "core/row_order.hpp"

#include <algorithm>
#include <numeric>

#include "core/integers.hpp"

namespace marlinq {
namespace {

// Calls with the first row, the end and the group of each run of rows that are of one group.
template <class F>
void for_each_run(std::span<const std::int32_t> group_of_row, const F& f) {
  for (auto first = group_of_row.begin(); first != group_of_row.end();) {
    const std::int32_t group = *first;
    const auto end = std::find_if(first + 1, group_of_row.end(),
                                  [group](std::int32_t other) { return other != group; });
    f(first - group_of_row.begin(), end - group_of_row.begin(), static_cast<std::size_t>(group));
    first = end;
  }
}

}  // namespace

RowOrder make_row_order(std::span<const std::int32_t> group_of_row, std::int64_t groups,
                        int alignment, int max_block) {
  std::vector<std::int64_t> next(static_cast<std::size_t>(groups) + 1, 0);
  for_each_run(group_of_row, [&next](std::int64_t begin, std::int64_t end, std::size_t group) {
    next[group + 1] += end - begin;
  });
  RowOrder order;
  order.blocks.reserve(group_of_row.size() / static_cast<std::size_t>(max_block) +
                       static_cast<std::size_t>(groups));
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
  for_each_run(group_of_row, [&](std::int64_t begin, std::int64_t end, std::size_t group) {
    const std::int64_t packed = next[group];
    const auto target = order.source.begin() + packed;
    std::iota(target, target + (end - begin), static_cast<std::int32_t>(begin));
    order.identity = order.identity && packed == begin;
    next[group] += end - begin;
  });
  return order;
}

}  // namespace marlinq
