// make_row_order against its definition.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "core/row_order.hpp"
#include "support/generators.hpp"

namespace marlinq {
namespace {

// What row_order.hpp says, written down directly.
void check(const std::vector<std::int32_t>& group_of_row, std::int64_t groups, int alignment,
           int max_block) {
  const RowOrder order = make_row_order(group_of_row, groups, alignment, max_block);
  std::vector<std::int32_t> source;
  std::vector<RowBlock> blocks;
  for (std::int32_t g = 0; g < groups; ++g) {
    const auto first = static_cast<std::int32_t>(source.size());
    for (std::size_t row = 0; row < group_of_row.size(); ++row) {
      if (group_of_row[row] == g) source.push_back(static_cast<std::int32_t>(row));
    }
    while (source.size() % static_cast<std::size_t>(alignment) != 0) source.push_back(-1);
    const auto last = static_cast<std::int32_t>(source.size());
    for (std::int32_t at = first; at < last; at += max_block) {
      blocks.push_back({at, std::min(max_block, last - at), g});
    }
  }
  EXPECT_EQ(order.source, source);
  EXPECT_EQ(order.blocks, blocks);
  EXPECT_EQ(order.rows(), static_cast<std::int64_t>(source.size()));
  bool identity = true;
  for (std::size_t i = 0; i < group_of_row.size(); ++i) {
    identity = identity && source[i] == static_cast<std::int32_t>(i);
  }
  EXPECT_EQ(order.identity, identity);
}

TEST(RowOrderTest, PlainGroups) {
  check(std::vector<std::int32_t>(256, 0), 1, 8, 128);
  check({0}, 1, 8, 128);
  check({0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1}, 2, 8, 128);
  EXPECT_TRUE(make_row_order(std::vector<std::int32_t>(13, 0), 1, 8, 128).identity);
}

TEST(RowOrderTest, PaddingInsideIsNotIdentity) {
  const std::vector<std::int32_t> groups = {0, 0, 0, 1, 1, 1};
  check(groups, 2, 8, 128);
  EXPECT_FALSE(make_row_order(groups, 2, 8, 128).identity);
}

TEST(RowOrderTest, EmptyGroupsTakeNoRows) {
  check({2, 2, 5}, 7, 8, 16);
  const RowOrder order = make_row_order(std::vector<std::int32_t>{2, 2, 5}, 7, 8, 16);
  EXPECT_EQ(order.blocks.size(), 2U);
  EXPECT_EQ(order.rows(), 16);
}

TEST(RowOrderTest, StableInsideAGroup) {
  const std::vector<std::int32_t> source =
      make_row_order(std::vector<std::int32_t>{1, 0, 1, 0}, 2, 2, 2).source;
  EXPECT_EQ(source, (std::vector<std::int32_t>{1, 3, 0, 2}));
}

TEST(RowOrderTest, RandomGroups) {
  test::Random random(3);
  for (int round = 0; round < 200; ++round) {
    SCOPED_TRACE(::testing::Message() << "round " << round);
    const std::int64_t groups = 1 + random.below(9);
    std::vector<std::int32_t> group_of_row(static_cast<std::size_t>(1 + random.below(400)));
    for (auto& group : group_of_row) group = static_cast<std::int32_t>(random.below(groups));
    const int alignment = 1 << random.below(4);
    check(group_of_row, groups, alignment, alignment * static_cast<int>(1 + random.below(16)));
  }
}

}  // namespace
}  // namespace marlinq
