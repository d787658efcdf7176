// The tests' own tools: the reference finds what the generator drew, and the judges can say no.
#include <gtest/gtest.h>

#include <limits>
#include <set>
#include <utility>
#include <vector>

#include "support/compare.hpp"
#include "support/generators.hpp"

namespace marlinq::test {
namespace {

TEST(ReferenceTest, DequantisesWhatTheGeneratorDrew) {
  for (const int bits : {2, 3, 4, 8}) {
    for (const Zeros zeros : {Zeros::kAbsent, Zeros::kSymmetricV1, Zeros::kSymmetricV2,
                              Zeros::kAsymmetricV1, Zeros::kAsymmetricV2}) {
      for (const Order order : {Order::kNone, Order::kTrivial, Order::kActOrder, Order::kUnbalanced,
                                Order::kNegative}) {
        const Layer layer = make_layer({.bits = bits,
                                        .k = 70,
                                        .n = 19,
                                        .group_size = 16,
                                        .zeros = zeros,
                                        .order = order,
                                        .scales = DType::kFloat32,
                                        .seed = 9});
        SCOPED_TRACE(describe(layer.options));
        const Dense dense = layer.dense();
        for (std::int64_t k = 0; k < 70; ++k) {
          for (std::int64_t n = 0; n < 19; ++n) {
            const std::int64_t g = layer.group_of_row[static_cast<std::size_t>(k)];
            const double code = layer.codes[static_cast<std::size_t>(k * 19 + n)];
            const double zero = layer.zeros[static_cast<std::size_t>(g * 19 + n)];
            const double scale = read_element(layer.scales.data(), DType::kFloat32, g * 19 + n);
            ASSERT_EQ(dense.at(k, n), (code - zero) * scale) << k << ", " << n;
          }
        }
      }
    }
  }
}

TEST(ReferenceTest, MultipliesAsWritten) {
  const Dense dense{.k = 2, .n = 2, .w = {1, 2, 3, 4}, .bias = {10, 20}};
  const Product product = multiply({5, 6, 0, 1}, 2, dense);
  EXPECT_EQ(product.y, (std::vector<double>{33, 54, 13, 24}));
  EXPECT_EQ(product.energy, (std::vector<double>{25 * 5 + 36 * 25 + 500, 25 + 500}));
}

TEST(CompareTest, RejectsWhatIsWrong) {
  Matrix out(1, 2, DType::kFloat32);
  out.set(0, 0, 1.0);
  out.set(0, 1, 1.0);
  Product product{.m = 1, .n = 2, .y = {1.0, 1.0}, .energy = {2.0}};
  EXPECT_TRUE(matches(out, product, 1));
  out.set(0, 1, 1.0 + 1e-4);
  EXPECT_FALSE(matches(out, product, 1));
  out.set(0, 1, std::numeric_limits<double>::quiet_NaN());
  EXPECT_FALSE(matches(out, product, 1));
  out.set(0, 1, 1.0);
  static_cast<unsigned char*>(out.data())[8] = 0;
  EXPECT_FALSE(matches(out, product, 1));
}

TEST(CompareTest, LargeOutputsAreMeasuredAgainstThemselves) {
  std::vector<double> expected(256, 1.0);
  std::vector<double> actual = expected;
  for (double& value : actual) value += 1.5e-6;
  EXPECT_TRUE(within(actual, expected, 1e12, 16, 2e-6));
  for (double& value : actual) value += 1e-6;
  EXPECT_FALSE(within(actual, expected, 1e12, 16, 2e-6));  // a large energy does not help
}

TEST(MatrixTest, GuardsSeeEveryByteOutside) {
  Matrix matrix(2, 3, DType::kFloat16, 2);
  matrix.fill(1.5);
  EXPECT_TRUE(matrix.guards_intact());
  EXPECT_FALSE(matrix.guards_intact(1));
  auto* bytes = static_cast<unsigned char*>(matrix.data());
  bytes[6] = 1;  // between the rows
  EXPECT_FALSE(matrix.guards_intact());
  Matrix before(1, 1, DType::kFloat32);
  static_cast<unsigned char*>(before.data())[-1] = 0;
  EXPECT_FALSE(before.guards_intact());
}

TEST(PairwiseTest, EveryPairOccurs) {
  const std::vector<int> sizes = {4, 9, 5, 3, 2};
  const auto rows = pairwise_cover(sizes, 1);
  EXPECT_LT(rows.size(), 80U);
  for (std::size_t a = 0; a < sizes.size(); ++a) {
    for (std::size_t b = a + 1; b < sizes.size(); ++b) {
      std::set<std::pair<int, int>> seen;
      for (const auto& row : rows) seen.emplace(row[a], row[b]);
      EXPECT_EQ(seen.size(), static_cast<std::size_t>(sizes[a] * sizes[b]));
    }
  }
}

}  // namespace
}  // namespace marlinq::test
