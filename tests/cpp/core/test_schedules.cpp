// The text of measured schedules.
#include <gtest/gtest.h>

#include <string>
#include <utility>

#include "marlinq/schedules.hpp"
#include "support/compare.hpp"

namespace marlinq {
namespace {

using test::expect_error;

TEST(SchedulesTest, TextComesBackAsItWas) {
  const Schedules schedules = {{"NVIDIA H200, 132 multiprocessors", "sm90", 4, 128, 4096, 14336, 1,
                                8, "sm90 strips tokens=8 warps=8"},
                               {"A GPU", "sm80", 8, -1, 1, 70000, 65, 65536, "x"}};
  const std::string text = to_text(schedules);
  EXPECT_EQ(text,
            "NVIDIA H200, 132 multiprocessors | sm90 | w4 g128 | 4096x14336 | 1-8 | "
            "sm90 strips tokens=8 warps=8\n"
            "A GPU | sm80 | w8 g-1 | 1x70000 | 65-65536 | x\n");
  EXPECT_EQ(parse_schedules(text), schedules);
  EXPECT_EQ(to_text({}), "");
  EXPECT_TRUE(parse_schedules("").empty());
}

TEST(SchedulesTest, BlankLinesCommentsAndSpacesSayNothing) {
  const Schedules parsed =
      parse_schedules("# of a node\n\n  \t\r\n  A | sm90|w4 g64 |\t8x16| 1-2|one  two  \r\n # end");
  ASSERT_EQ(parsed.size(), 1u);
  EXPECT_EQ(parsed[0], (ScheduleEntry{"A", "sm90", 4, 64, 8, 16, 1, 2, "one  two"}));
}

TEST(SchedulesTest, RefusalsNameTheLineAndWhatIsExpected) {
  const auto refused = [](const std::string& line, const std::string& message) {
    expect_error(ErrorCode::kInvalidArgument, {"schedules: line 3", message},
                 [&] { parse_schedules("# a comment\n\n" + line + "\n"); });
  };
  refused("A | sm90 | w4 g128 | 8x8 | 1-2", "5 fields, expected 6");
  refused("A | sm90 | w4 g128 | 8x8 | 1-2 | x | y", "7 fields, expected 6");
  for (const char* format : {"", "4 g128", "w g128", "w4g128", "w4 g", "w4 g128 desc", "w4 gx"})
    refused(std::string("A | sm90 | ") + format + " | 8x8 | 1-2 | x", "expected bits and group");
  for (const char* shape : {"", "8", "8x", "x8", "0x8", "8x0", "-8x8", "8x8x8", "8 x 8"})
    refused(std::string("A | sm90 | w4 g128 | ") + shape + " | 1-2 | x", "expected NxK");
  for (const char* rows : {"", "1", "0-2", "3-2", "1-", "1-2-3", "99999999999999999999-1"})
    refused(std::string("A | sm90 | w4 g128 | 8x8 | ") + rows + " | x", "the first and the last");
  refused("A | sm90 | w4 g128 | 8x8 | 1-2 | ", "no schedule, expected one");
}

}  // namespace
}  // namespace marlinq
