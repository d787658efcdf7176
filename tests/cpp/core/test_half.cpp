// half.hpp, exhaustively, against the definition of the formats.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <string>

#include "core/half.hpp"
#include "support/generators.hpp"
#include "support/numbers.hpp"

namespace marlinq {
namespace {

using test::decode_float;
using test::encode_float;

struct Case {
  const char* name;
  test::FloatFormat format;
  float (*widen)(std::uint16_t);
  std::uint16_t (*narrow)(float);
};

class HalfTest : public ::testing::TestWithParam<Case> {};

TEST_P(HalfTest, EveryValueWidensAsDefinedAndComesBack) {
  const Case& c = GetParam();
  for (std::uint32_t bits = 0; bits <= 0xFFFFU; ++bits) {
    const float wide = c.widen(static_cast<std::uint16_t>(bits));
    const double expected = decode_float(bits, c.format);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(wide)) << "bits " << bits;
      ASSERT_TRUE(std::isnan(decode_float(c.narrow(wide), c.format))) << "bits " << bits;
      continue;
    }
    ASSERT_EQ(static_cast<double>(wide), expected) << "bits " << bits;
    ASSERT_EQ(std::signbit(wide), std::signbit(expected)) << "bits " << bits;
    ASSERT_EQ(c.narrow(wide), bits);
  }
}

// Every value, every midpoint of neighbours, and the floats next to them.
TEST_P(HalfTest, RoundsToNearestEven) {
  const Case& c = GetParam();
  for (std::uint32_t bits = 0; bits <= 0xFFFFU; ++bits) {
    const double here = decode_float(bits, c.format);
    const double next = decode_float((bits + 1) & 0xFFFFU, c.format);
    if (!std::isfinite(here)) continue;
    const auto middle = static_cast<float>((here + (std::isfinite(next) ? next : here)) / 2);
    for (const float value :
         {static_cast<float>(here), middle, std::nextafter(middle, INFINITY),
          std::nextafter(middle, -INFINITY), std::nextafter(static_cast<float>(here), INFINITY)}) {
      ASSERT_EQ(c.narrow(value), encode_float(static_cast<double>(value), c.format))
          << "value " << value << " beside bits " << bits;
    }
  }
}

TEST_P(HalfTest, RoundsRandomFloats) {
  const Case& c = GetParam();
  test::Random random(7);
  for (int i = 0; i < 300000; ++i) {
    const auto value = std::bit_cast<float>(static_cast<std::uint32_t>(random.next()));
    const std::uint32_t expected = encode_float(static_cast<double>(value), c.format);
    const std::uint32_t actual = c.narrow(value);
    if (std::isnan(value)) {
      ASSERT_TRUE(std::isnan(decode_float(actual, c.format)));
    } else {
      ASSERT_EQ(actual, expected) << "value " << value;
    }
  }
}

TEST_P(HalfTest, OverflowsToInfinityFromHalfAStepBeyondTheLargest) {
  const Case& c = GetParam();
  const std::uint32_t infinity = c.format.all_ones_exponent() << c.format.mantissa_bits;
  const double largest = decode_float(infinity - 1, c.format);
  const double step = largest - decode_float(infinity - 2, c.format);
  const auto limit = static_cast<float>(largest + step / 2);
  EXPECT_EQ(c.narrow(limit), infinity);
  EXPECT_EQ(c.narrow(std::nextafter(limit, 0.0F)), infinity - 1);
  EXPECT_EQ(c.narrow(-limit), infinity | 0x8000U);
  EXPECT_EQ(c.narrow(INFINITY), infinity);
}

INSTANTIATE_TEST_SUITE_P(Formats, HalfTest,
                         ::testing::Values(Case{"float16", test::kHalf,
                                                [](std::uint16_t b) { return float16_to_float(b); },
                                                [](float v) { return float_to_float16(v); }},
                                           Case{
                                               "bfloat16", test::kBrain,
                                               [](std::uint16_t b) { return bfloat16_to_float(b); },
                                               [](float v) { return float_to_bfloat16(v); }}),
                         [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace marlinq
