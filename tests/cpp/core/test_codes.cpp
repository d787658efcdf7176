// The readers of packed codes and zero points, at every column, row and byte alignment.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/codes.hpp"
#include "support/generators.hpp"
#include "support/reference.hpp"

namespace marlinq {
namespace {

using test::Layer;
using test::LayerOptions;
using test::Zeros;

class CodesTest : public ::testing::TestWithParam<int> {};

TEST_P(CodesTest, PackedWordsCoverTheCodes) {
  const int bits = GetParam();
  EXPECT_EQ(packed_words(0, bits), 0);
  EXPECT_EQ(packed_words(1, bits), 1);
  EXPECT_EQ(packed_words(32, bits), bits);
  EXPECT_EQ(packed_words(33, bits), bits + 1);
}

TEST_P(CodesTest, EveryCodeAtEveryAlignment) {
  const int bits = GetParam();
  const Layer layer = test::make_layer({.bits = bits, .k = 77, .n = 37, .seed = 11});
  for (std::size_t shift = 0; shift < 4; ++shift) {
    std::vector<std::uint8_t> bytes(layer.qweight.size() * 4 + shift);
    std::memcpy(bytes.data() + shift, layer.qweight.data(), layer.qweight.size() * 4);
    for (std::int64_t row = 0; row < 77; ++row) {
      for (std::int64_t column = 0; column < 37; column += 5) {
        const int count = static_cast<int>(std::min<std::int64_t>(8, 37 - column));
        const int place = static_cast<int>((row * 3 + column) % (33 - bits));
        const std::uint32_t field = ((1U << bits) - 1U) << place;
        std::uint32_t words[8];
        std::fill_n(words, 8, ~field);  // what else a word holds stays
        place_code_row(bytes.data() + shift, bits, 37, row, column, count, place, words);
        for (int i = 0; i < 8; ++i) {
          const std::uint32_t code =
              i < count ? layer.codes[static_cast<std::size_t>(row * 37 + column + i)] : 0U;
          ASSERT_EQ(words[i], ~field | code << place)
              << "row " << row << ", column " << column + i << ", shift " << shift;
        }
      }
    }
  }
}

TEST_P(CodesTest, EveryZeroPointOfBothConventions) {
  const int bits = GetParam();
  for (const Zeros zeros : {Zeros::kAsymmetricV1, Zeros::kAsymmetricV2, Zeros::kSymmetricV1,
                            Zeros::kSymmetricV2, Zeros::kAbsent}) {
    const Layer layer = test::make_layer(
        {.bits = bits, .k = 64, .n = 71, .group_size = 8, .zeros = zeros, .seed = 5});
    ValidatedModule module;
    module.n = 71;
    module.qzeros = zeros == Zeros::kAbsent
                        ? nullptr
                        : reinterpret_cast<const std::uint8_t*>(layer.qzeros.data());
    module.zero_points = layer.convention();
    for (std::int64_t group = 0; group < layer.groups; ++group) {
      for (std::int64_t column = 0; column < 71; column += 3) {
        const int count = static_cast<int>(std::min<std::int64_t>(7, 71 - column));
        std::uint8_t values[7] = {};
        read_zero_points(module, bits, group, column, count, values);
        for (int i = 0; i < count; ++i) {
          ASSERT_EQ(values[i], layer.zeros[static_cast<std::size_t>(group * 71 + column + i)])
              << "group " << group << ", column " << column + i << ", zeros "
              << static_cast<int>(zeros);
        }
      }
    }
  }
}

// A zero point of 0 borrows from the fields above it, and the sum modulo 2^32 restores them all.
TEST_P(CodesTest, BorrowedZeroPointsAreExact) {
  const int bits = GetParam();
  const int fields = bits == 3 ? 32 : 32 / bits;
  const std::uint32_t size = 1U << bits;
  for (int first_zero = 0; first_zero < fields; ++first_zero) {
    LayerOptions options{
        .bits = bits, .k = 8, .n = fields, .group_size = 8, .zeros = Zeros::kAsymmetricV1};
    Layer layer = test::make_layer(options);
    for (int i = 0; i < fields; ++i) {
      layer.zeros[static_cast<std::size_t>(i)] =
          i == first_zero ? 0U : static_cast<std::uint32_t>(i * 7 + 1) % size;
    }
    test::pack_zeros(layer);
    ValidatedModule module;
    module.n = fields;
    module.qzeros = reinterpret_cast<const std::uint8_t*>(layer.qzeros.data());
    module.zero_points = ZeroPoints::kV1;
    std::uint8_t values[32] = {};
    read_zero_points(module, bits, 0, 0, fields, values);
    for (int i = 0; i < fields; ++i) {
      EXPECT_EQ(values[i], layer.zeros[static_cast<std::size_t>(i)])
          << "zero at " << first_zero << ", field " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Bits, CodesTest, ::testing::Values(2, 3, 4, 8));

}  // namespace
}  // namespace marlinq
