// The kernels: every code, every shape, every combination of formats, and the bit-for-bit promises.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "support/compare.hpp"
#include "support/cpu_kernels.hpp"

namespace marlinq {
namespace {

using test::Dense;
using test::Layer;
using test::LayerOptions;
using test::make_layer;
using test::Matrix;
using test::Order;
using test::Product;
using test::Random;
using test::random_matrix;
using test::Zeros;

using LinearPtr = std::unique_ptr<Linear<CpuBackend>>;

class GemmTest : public test::CpuKernelTest {
 protected:
  LinearPtr load(const GptqTensors& tensors, const GptqSpec& spec) {
    LinearPtr linear = CpuBackend::load_gptq(context_, tensors, spec, options());
    EXPECT_EQ(linear->describe().kernel, GetParam().name);
    return linear;
  }
  LinearPtr load(const Layer& layer) { return load(layer.tensors(), layer.spec()); }

  // Exactly, or within the roundings of the steps of integers.
  ::testing::AssertionResult is_weight(double actual, float expected) const {
    const bool integers =
        GetParam().compute == Compute::kInt16 || GetParam().compute == Compute::kInt8;
    const double allowed =
        integers ? std::fabs(static_cast<double>(expected)) * test::tolerances::kCodesIntegers : 0;
    if (std::fabs(actual - static_cast<double>(expected)) <= allowed) {
      return ::testing::AssertionSuccess();
    }
    return ::testing::AssertionFailure() << actual << ", expected " << expected;
  }

  CpuBackend::Context context_{1};
};

INSTANTIATE_TEST_SUITE_P(Kernels, GemmTest, ::testing::ValuesIn(test::cpu_kernels()),
                         test::kernel_name);

// --- every code with every zero point ---

// Row k of the weight has code k, column n has zero point n, and x is the identity: y[k][n] is the
// weight itself, (k - n) * scale rounded to float32 once; where x is held as integers, 1 is a number
// of steps, and the scale has a rounding more. Alone and in a batch, which take different ways
// through the kernel.
TEST_P(GemmTest, DecodesEveryCodeWithEveryZeroPointExactly) {
  for (const int bits : {2, 3, 4, 8}) {
    const std::int64_t size = std::int64_t{1} << bits;
    for (const Zeros zeros : {Zeros::kAsymmetricV1, Zeros::kAsymmetricV2}) {
      for (const DType scales : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
        Layer layer = make_layer({.bits = bits,
                                  .k = size,
                                  .n = size,
                                  .group_size = -1,
                                  .zeros = zeros,
                                  .scales = scales,
                                  .seed = 3});
        for (std::int64_t k = 0; k < size; ++k) {
          for (std::int64_t n = 0; n < size; ++n) {
            layer.codes[static_cast<std::size_t>(k * size + n)] = static_cast<std::uint32_t>(k);
          }
          layer.zeros[static_cast<std::size_t>(k)] = static_cast<std::uint32_t>(k);
        }
        test::pack_codes(layer);
        test::pack_zeros(layer);
        const LinearPtr linear = load(layer);
        Matrix x(size, size, DType::kFloat32);
        x.fill(0.0);
        for (std::int64_t i = 0; i < size; ++i) x.set(i, i, 1.0);
        Matrix batch(size, size, DType::kFloat32);
        linear->forward(context_, x.input(), batch.view(), size);
        ASSERT_TRUE(batch.guards_intact());
        for (std::int64_t k = 0; k < size; ++k) {
          Matrix alone(1, size, DType::kFloat32);
          ConstMatrixView row = x.input();
          row.data = static_cast<const float*>(x.data()) + k * size;
          row.rows = 1;
          linear->forward(context_, row, alone.view(), 1);
          for (std::int64_t n = 0; n < size; ++n) {
            const double scale = test::read_element(layer.scales.data(), scales, n);
            const auto expected = static_cast<float>(static_cast<double>(k - n) * scale);
            ASSERT_TRUE(is_weight(batch.at(k, n), expected))
                << bits << " bits, code " << k << ", zero point " << n;
            ASSERT_TRUE(is_weight(alone.at(0, n), expected))
                << bits << " bits, code " << k << ", zero point " << n << ", alone";
          }
        }
      }
    }
  }
}

// The same for symmetric weights, which are stored without zero points.
TEST_P(GemmTest, DecodesEveryCodeOfSymmetricWeightsExactly) {
  for (const int bits : {2, 3, 4, 8}) {
    const std::int64_t size = std::int64_t{1} << bits;
    for (const Zeros zeros : {Zeros::kAbsent, Zeros::kSymmetricV1, Zeros::kSymmetricV2}) {
      Layer layer = make_layer({.bits = bits,
                                .k = size,
                                .n = 33,
                                .group_size = -1,
                                .zeros = zeros,
                                .scales = DType::kFloat32});
      for (std::int64_t i = 0; i < size * 33; ++i) {
        layer.codes[static_cast<std::size_t>(i)] = static_cast<std::uint32_t>(i / 33);
      }
      test::pack_codes(layer);
      const LinearPtr linear = load(layer);
      Matrix x(size, size, DType::kFloat32);
      x.fill(0.0);
      for (std::int64_t i = 0; i < size; ++i) x.set(i, i, 1.0);
      Matrix y(size, 33, DType::kFloat32);
      linear->forward(context_, x.input(), y.view(), size);
      for (std::int64_t k = 0; k < size; ++k) {
        for (std::int64_t n = 0; n < 33; ++n) {
          const double scale = test::read_element(layer.scales.data(), DType::kFloat32, n);
          ASSERT_TRUE(
              is_weight(y.at(k, n), static_cast<float>(static_cast<double>(k - size / 2) * scale)))
              << bits << " bits, code " << k;
        }
      }
    }
  }
}

// --- every shape ---

const std::vector<std::int64_t> kExtents = {1, 7, 32, 60, 64, 96, 192, 320, 416, 576, 704, 1408};
const std::vector<std::int64_t> kRowCounts = {0, 1, 2, 7, 16, 17, 63, 64, 65, 257};

// One weight of 1408 x 1408, whose upper left corners are the weights of the grid, and the products
// of all of its prefixes along K: made once for all kernels.
class Grid {
 public:
  static const Grid& get(Zeros zeros) {
    static std::map<Zeros, std::unique_ptr<Grid>> grids;
    std::unique_ptr<Grid>& grid = grids[zeros];
    if (grid == nullptr) grid = std::make_unique<Grid>(zeros);
    return *grid;
  }

  explicit Grid(Zeros zeros)
      : layer_(make_layer({.bits = 4, .k = kMost, .n = kMost, .zeros = zeros, .seed = 42})),
        x_(random_matrix(kRows, kMost, DType::kFloat32, 43)) {
    const std::vector<double> x = x_.values();
    const Dense dense = layer_.dense();
    std::vector<double> y(static_cast<std::size_t>(kRows * kMost));
    std::int64_t k = 0;
    for (const std::int64_t extent : kExtents) {
      test::accumulate(x, kMost, kRows, dense, k, extent, y);
      k = extent;
      products_[extent] = y;
    }
    for (std::int64_t at = 0; at < kMost; ++at) {
      for (std::int64_t n = 0; n < kMost; ++n)
        squares_.push_back(dense.at(at, n) * dense.at(at, n));
    }
  }

  // The first k rows and n columns, as tensors of their own. The last word of a column holds codes
  // past k, and the last word of a row of zero points fields past n.
  Layer corner(std::int64_t k, std::int64_t n) const {
    Layer part;
    part.options = layer_.options;
    part.options.k = k;
    part.options.n = n;
    part.groups = test::divide_up(k, 128);
    for (std::int64_t r = 0; r < test::divide_up(k, 8); ++r) {
      const auto row = layer_.qweight.begin() + r * kMost;
      part.qweight.insert(part.qweight.end(), row, row + n);
    }
    for (std::int64_t g = 0; g < part.groups; ++g) {
      const auto scales = layer_.scales.begin() + g * kMost * 2;
      part.scales.insert(part.scales.end(), scales, scales + n * 2);
      if (layer_.qzeros.empty()) continue;
      const auto zeros = layer_.qzeros.begin() + g * kMost / 8;
      part.qzeros.insert(part.qzeros.end(), zeros, zeros + test::divide_up(n, 8));
    }
    return part;
  }

  ConstMatrixView x(std::int64_t k) const {
    ConstMatrixView view = x_.input();
    view.cols = k;
    return view;
  }

  Product product(std::int64_t k, std::int64_t n) const {
    Product product{.m = kRows, .n = n, .y = {}, .energy = {}};
    const std::vector<double>& y = products_.at(k);
    for (std::int64_t m = 0; m < kRows; ++m) {
      product.y.insert(product.y.end(), y.begin() + m * kMost, y.begin() + m * kMost + n);
      double energy = 0;
      for (std::int64_t at = 0; at < k && m * n < 256; ++at) {  // only small outputs ask for it
        double sum = 0;
        for (std::int64_t c = 0; c < n; ++c)
          sum += squares_[static_cast<std::size_t>(at * kMost + c)];
        energy += x_.at(m, at) * x_.at(m, at) * sum;
      }
      product.energy.push_back(energy);
    }
    return product;
  }

  static constexpr std::int64_t kMost = 1408;
  static constexpr std::int64_t kRows = 257;

 private:
  Layer layer_;
  Matrix x_;
  std::map<std::int64_t, std::vector<double>> products_;
  std::vector<double> squares_;
};

TEST_P(GemmTest, EveryShape) {
  const cpu::IsaKernels& isa = cpu::choose_isa(GetParam().name);
  if (!cpu::arithmetic_of(isa, GetParam().compute).native) {
    GTEST_SKIP() << "the shapes of an emulated compute type are those of float32";
  }
  CpuBackend::Context three(3);
  for (const Zeros zeros : {Zeros::kAbsent, Zeros::kAsymmetricV1}) {
    const Grid& grid = Grid::get(zeros);
    for (const std::int64_t k : kExtents) {
      for (const std::int64_t n : kExtents) {
        const Layer layer = grid.corner(k, n);
        const LinearPtr linear = load(layer);
        const Product expected = grid.product(k, n);
        Matrix whole(Grid::kRows, n, DType::kFloat32);
        linear->forward(context_, grid.x(k), whole.view(), Grid::kRows);
        ASSERT_TRUE(test::matches(whole, expected, Grid::kRows, bound()))
            << describe(layer.options);
        for (const std::int64_t m : kRowCounts) {
          Matrix out(m + 1, n, DType::kFloat32);  // one row more than is asked for
          linear->forward(m % 2 == 0 ? context_ : three, grid.x(k), out.view(), m);
          ASSERT_TRUE(out.guards_intact(m)) << describe(layer.options) << ", m " << m;
          // The rows of a smaller batch are those of the largest one, bit for bit.
          ASSERT_EQ(out.row_bytes(0, m), whole.row_bytes(0, m))
              << describe(layer.options) << ", m " << m;
          if (m * n < 256) {
            ASSERT_TRUE(test::matches(out, expected, m, bound()))
                << describe(layer.options) << ", m " << m;
          }
        }
      }
    }
  }
}

// --- every pair of everything else ---

TEST_P(GemmTest, EveryPairOfFormats) {
  const std::vector<int> bits = {2, 3, 4, 8};
  const std::vector<std::int64_t> group_sizes = {-1, 16, 32, 64, 128, 256, 1024, 24, 7};
  const std::vector<Zeros> zeros = {Zeros::kAbsent, Zeros::kSymmetricV1, Zeros::kSymmetricV2,
                                    Zeros::kAsymmetricV1, Zeros::kAsymmetricV2};
  const std::vector<Order> orders = {Order::kNone, Order::kTrivial, Order::kActOrder,
                                     Order::kUnbalanced, Order::kNegative};
  const std::vector<DType> floats = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  const std::vector<std::optional<DType>> biases = {std::nullopt, DType::kFloat32, DType::kFloat16,
                                                    DType::kBFloat16};
  const std::vector<std::int64_t> strides = {0, 1, 16};
  const std::vector<int> threads = {1, 2, 3, 5, 8};
  const std::vector<std::int64_t> row_counts = {1, 2, 3, 9, 17, 66, 130};
  const std::vector<std::int64_t> ks = {60, 96, 333, 1100, 1408};
  const std::vector<std::int64_t> ns = {7, 48, 64, 100, 321};
  const std::vector<int> parts = {1, 2, 3};
  const auto size = [](const auto& values) { return static_cast<int>(values.size()); };
  const auto cover =
      test::pairwise_cover({size(bits), size(group_sizes), size(zeros), size(orders), size(floats),
                            size(biases), size(floats), 2, size(strides), size(strides),
                            size(threads), size(row_counts), size(ks), size(ns), size(parts)},
                           2024);
  std::uint64_t seed = 1000;
  for (const std::vector<int>& row : cover) {
    std::size_t axis = 0;
    const auto take = [&](const auto& values) {
      return values[static_cast<std::size_t>(row[axis++])];
    };
    LayerOptions options;
    options.bits = take(bits);
    options.group_size = take(group_sizes);
    options.zeros = take(zeros);
    options.order = take(orders);
    options.scales = take(floats);
    options.bias = take(biases);
    const DType x_dtype = take(floats);
    const DType out_dtype = row[axis++] == 0 ? x_dtype : DType::kFloat32;
    const std::int64_t x_stride = take(strides);
    const std::int64_t out_stride = take(strides);
    const int thread_count = take(threads);
    const std::int64_t m = take(row_counts);
    options.k = take(ks);
    options.n = take(ns);
    const int part_count = take(parts);

    std::vector<Layer> layers;
    for (int part = 0; part < part_count; ++part) {
      options.seed = ++seed;
      options.name = "part " + std::to_string(part);
      layers.push_back(make_layer(options));
      options.n = options.n / 2 + 1;
    }
    SCOPED_TRACE(::testing::Message()
                 << describe(layers.front().options) << ", " << part_count << " parts, m " << m
                 << ", x " << to_string(x_dtype) << " stride +" << x_stride << ", out "
                 << to_string(out_dtype) << " stride +" << out_stride << ", " << thread_count
                 << " threads");
    const LinearPtr linear = load(test::fused(layers), layers.front().spec());
    const Dense dense = test::fused_dense(layers);
    const Matrix x = random_matrix(m, dense.k, x_dtype, ++seed, x_stride);
    Matrix out(m, dense.n, out_dtype, out_stride);
    CpuBackend::Context context(thread_count);
    linear->forward(context, x.input(), out.view(), m);
    ASSERT_TRUE(test::matches(out, test::multiply(x.values(), m, dense), m, bound()));

    // Again, with another number of threads, and the last row alone.
    Matrix again(m, dense.n, out_dtype);
    linear->forward(context_, x.input(), again.view(), m);
    ASSERT_EQ(again.row_bytes(0, m), out.row_bytes(0, m));
    Matrix alone(1, dense.n, out_dtype);
    ConstMatrixView last = x.input();
    last.data = static_cast<const char*>(last.data) +
                static_cast<std::size_t>((m - 1) * last.row_stride) * size_of(x_dtype);
    last.rows = 1;
    linear->forward(context, last, alone.view(), 1);
    ASSERT_EQ(alone.row_bytes(0, 1), out.row_bytes(m - 1, 1));
  }
}

// --- bit for bit ---

TEST_P(GemmTest, BitsDoNotDependOnThreadsRunsOrBatch) {
  for (const Zeros zeros : {Zeros::kSymmetricV1, Zeros::kAsymmetricV1}) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      const Layer layer = make_layer({.bits = 4,
                                      .k = 416,
                                      .n = 327,
                                      .group_size = 64,
                                      .zeros = zeros,
                                      .order = Order::kActOrder,
                                      .bias = DType::kFloat16});
      const LinearPtr linear = load(layer);
      constexpr std::int64_t kRows = 140;
      const Matrix x = random_matrix(kRows, 416, dtype, 5);
      Matrix first(kRows, 327, dtype);
      linear->forward(context_, x.input(), first.view(), kRows);
      for (const int threads : {1, 2, 3, 5, 8}) {
        CpuBackend::Context context(threads);
        for (int run = 0; run < 3; ++run) {
          Matrix out(kRows, 327, dtype);
          linear->forward(context, x.input(), out.view(), kRows);
          ASSERT_EQ(out.row_bytes(0, kRows), first.row_bytes(0, kRows))
              << threads << " threads, run " << run;
        }
        for (std::int64_t row = 0; row < kRows; row += 13) {
          ConstMatrixView one = x.input();
          one.data = static_cast<const char*>(one.data) +
                     static_cast<std::size_t>(row * one.row_stride) * size_of(dtype);
          one.rows = 1;
          Matrix out(1, 327, dtype);
          linear->forward(context, one, out.view(), 1);
          ASSERT_EQ(out.row_bytes(0, 1), first.row_bytes(row, 1)) << "row " << row;
        }
      }
    }
  }
}

// A row that holds NaN or infinity is that row's own trouble.
TEST_P(GemmTest, BadRowsDoNotSpread) {
  const Layer layer =
      make_layer({.k = 100, .n = 40, .group_size = 32, .order = Order::kActOrder, .seed = 8});
  const LinearPtr linear = load(layer);
  for (const double bad :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    Matrix x = random_matrix(19, 100, DType::kFloat32, 9);
    const Product expected = test::multiply(x.values(), 19, layer.dense());
    for (std::int64_t k = 0; k < 100; ++k) x.set(7, k, bad);
    Matrix out(19, 40, DType::kFloat32);
    linear->forward(context_, x.input(), out.view(), 19);
    for (std::int64_t n = 0; n < 40; ++n) EXPECT_FALSE(std::isfinite(out.at(7, n)));
    for (std::int64_t n = 0; n < 40; ++n) {
      out.set(7, n, expected.y[static_cast<std::size_t>(7 * 40 + n)]);
    }
    EXPECT_TRUE(test::matches(out, expected, 19, bound()));
  }
}

// Outliers of every size, in blocks with and without: int16's steps are those of the largest element
// of 128 rows, and nothing else is lost.
TEST_P(GemmTest, Int16StaysBelowItsWorstCase) {
  if (GetParam().compute != Compute::kInt16) GTEST_SKIP() << "a promise of int16";
  for (const std::int64_t group_size : {-1, 32, 128, 1024}) {
    for (const Zeros zeros : {Zeros::kAbsent, Zeros::kAsymmetricV1}) {
      for (const int bits : {4, 8}) {
        const Layer layer = make_layer(
            {.bits = bits, .k = 1024, .n = 64, .group_size = group_size, .zeros = zeros});
        const LinearPtr linear = load(layer);
        const Dense dense = layer.dense();
        Matrix x = random_matrix(9, 1024, DType::kFloat32, 5);
        Random random(6);
        for (std::int64_t row = 0; row < 9; ++row) {
          for (int i = 0; i < row; ++i) {
            x.set(row, random.below(1024),
                  random.normal() * std::pow(10.0, static_cast<double>(row)));
          }
        }
        Matrix out(9, 64, DType::kFloat32);
        linear->forward(context_, x.input(), out.view(), 9);
        const Product expected = test::multiply(x.values(), 9, dense);
        for (std::int64_t row = 0; row < 9; ++row) {
          for (std::int64_t n = 0; n < 64; ++n) {
            double allowed = 0;
            double energy = 0;
            for (std::int64_t first = 0; first < 1024; first += 128) {
              double largest = 0;
              double weights = 0;
              for (std::int64_t k = first; k < first + 128; ++k) {
                largest = std::max(largest, std::fabs(x.at(row, k)));
                weights += std::fabs(dense.at(k, n));
                energy += std::pow(x.at(row, k) * dense.at(k, n), 2);
              }
              allowed += largest / 65000 * weights;
            }
            // Sums and scales are float32.
            allowed += test::tolerances::kLinearFloat32 * std::sqrt(energy);
            ASSERT_NEAR(out.at(row, n), expected.y[static_cast<std::size_t>(row * 64 + n)], allowed)
                << describe(layer.options) << ", row " << row;
          }
        }
      }
    }
  }
}

// Rows far from 1, whose steps or sums would leave the range of float32.
TEST_P(GemmTest, TinyAndHugeRows) {
  const Layer layer =
      make_layer({.k = 300, .n = 60, .group_size = 64, .zeros = Zeros::kAsymmetricV1, .seed = 12});
  const LinearPtr linear = load(layer);
  constexpr std::int64_t kRows = 24;
  Matrix x = random_matrix(kRows, 300, DType::kFloat32, 13);
  for (std::int64_t row = 0; row < kRows; ++row) {
    const double size = row % 3 == 0 ? 1e-31 : row % 3 == 1 ? 1e33 : 1.0;
    for (std::int64_t k = 0; k < 300; ++k) x.set(row, k, x.at(row, k) * size);
  }
  const Product expected = test::multiply(x.values(), kRows, layer.dense());
  for (const std::int64_t m : {std::int64_t{12}, kRows}) {
    Matrix out(m, 60, DType::kFloat32);
    ConstMatrixView some = x.input();
    some.rows = m;
    linear->forward(context_, some, out.view(), m);
    for (std::int64_t row = 0; row < m; ++row) {
      std::vector<double> actual;
      for (std::int64_t n = 0; n < 60; ++n) actual.push_back(out.at(row, n));
      const auto first = expected.y.begin() + row * 60;
      EXPECT_TRUE(test::within(actual, {first, first + 60},
                               expected.energy[static_cast<std::size_t>(row)], 60, bound()))
          << "row " << row << " of " << m;
    }
  }
}

// Sums that pass the range of float16 on the way to a result inside it.
TEST_P(GemmTest, Float16DoesNotOverflowOnTheWay) {
  Layer layer = make_layer({.k = 1024, .n = 32, .group_size = 128, .scales = DType::kFloat32});
  for (std::int64_t k = 0; k < 1024; ++k) {  // +7 in one half of K, -8 in the other
    for (std::int64_t n = 0; n < 32; ++n) {
      layer.codes[static_cast<std::size_t>(k * 32 + n)] = k < 512 ? 15 : 0;
    }
  }
  test::pack_codes(layer);
  for (std::int64_t i = 0; i < layer.groups * 32; ++i) {
    test::write_element(layer.scales.data(), DType::kFloat32, i, 0.01);
  }
  const LinearPtr linear = load(layer);
  Matrix x(3, 1024, DType::kFloat16);
  for (std::int64_t k = 0; k < 1024; ++k) {
    for (std::int64_t m = 0; m < 3; ++m) x.set(m, k, k < 512 ? 60000.0 : 52504.0);
  }
  Matrix out(3, 32, DType::kFloat16);
  linear->forward(context_, x.input(), out.view(), 3);
  const Product expected = test::multiply(x.values(), 3, layer.dense());
  for (const double y : expected.y) ASSERT_LT(std::fabs(y), 65504.0);
  for (std::int64_t m = 0; m < 3; ++m) {
    for (std::int64_t n = 0; n < 32; ++n) {
      // The halves nearly cancel, so the error is measured against what went into them.
      EXPECT_TRUE(std::isfinite(out.at(m, n)));
      EXPECT_NEAR(out.at(m, n), expected.y[static_cast<std::size_t>(m * 32 + n)],
                  std::sqrt(expected.energy[static_cast<std::size_t>(m)]) *
                      test::tolerances::kSmallOutputFactor *
                      test::bound_for(DType::kFloat16, bound()));
    }
  }
}

TEST_P(GemmTest, NothingIsWrittenForNoRows) {
  const Layer layer = make_layer({.k = 64, .n = 32});
  const LinearPtr linear = load(layer);
  Matrix out(2, 32, DType::kFloat32);
  const Matrix x = random_matrix(2, 64, DType::kFloat32, 1);
  linear->forward(context_, x.input(), out.view(), 0);
  EXPECT_TRUE(out.guards_intact(0));
  linear->forward(context_, {.cols = 64}, {.cols = 32}, 0);
}

// --- what a forward refuses ---

TEST(ForwardTest, RefusesViewsThatDoNotFit) {
  const Layer layer = make_layer({.k = 64, .n = 32});
  CpuBackend::Context context(1);
  const LinearPtr linear = CpuBackend::load_gptq(context, layer.tensors(), layer.spec());
  const Matrix x = random_matrix(4, 64, DType::kFloat16, 1);
  Matrix out(4, 32, DType::kFloat16);
  const auto refused = [&](std::initializer_list<std::string_view> parts, auto change,
                           std::int64_t m = 4) {
    ConstMatrixView in = x.input();
    MatrixView to = out.view();
    change(in, to);
    test::expect_refused(parts, [&] { linear->forward(context, in, to, m); });
    EXPECT_TRUE(out.guards_intact(0)) << "something was written before the refusal";
  };
  refused({"m: -1", "at least 0"}, [](auto&, auto&) {}, -1);
  refused({"x: 4 rows", "at least 5"}, [](auto&, auto&) {}, 5);
  refused({"x: 63 columns", "expected 64"}, [](auto& in, auto&) { in.cols = 63; });
  refused({"x: row stride 63"}, [](auto& in, auto&) { in.row_stride = 63; });
  refused({"x: row stride -64"}, [](auto& in, auto&) { in.row_stride = -64; });
  refused({"x: null data"}, [](auto& in, auto&) { in.data = nullptr; });
  refused({"x: on cuda:1", "expected cpu"},
          [](auto& in, auto&) { in.device = {DeviceKind::kCuda, 1}; });
  refused({"x: dtype int32", "float32, float16 or bfloat16"},
          [](auto& in, auto&) { in.dtype = DType::kInt32; });
  refused({"out: 31 columns", "expected 32"}, [](auto&, auto& to) { to.cols = 31; });
  refused({"out: 3 rows", "at least 4"}, [](auto&, auto& to) { to.rows = 3; });
  refused({"out: row stride 31"}, [](auto&, auto& to) { to.row_stride = 31; });
  refused({"out: null data"}, [](auto&, auto& to) { to.data = nullptr; });
  refused({"out: on cuda:0"}, [](auto&, auto& to) { to.device = {DeviceKind::kCuda, 0}; });
  refused({"out: dtype bfloat16", "float16 or float32"},
          [](auto&, auto& to) { to.dtype = DType::kBFloat16; });
  refused({"out: dtype float16", "expected the input's float32"},
          [](auto& in, auto&) { in.dtype = DType::kFloat32; });
  linear->forward(context, x.input(), out.view(), 4);  // and is none the worse for it
  EXPECT_TRUE(test::matches(out, test::multiply(x.values(), 4, layer.dense()), 4));
}

TEST(LoadTest, RefusesWhatTheBackendDoesNotDo) {
  const Layer layer = make_layer({.k = 64, .n = 32});
  CpuBackend::Context context(1);
  test::expect_refused({"kernel: 'abacus'", "expected one of", "generic"}, [&] {
    CpuBackend::load_gptq(context, layer.tensors(), layer.spec(), {.kernel = "abacus"});
  });
}

TEST(DescribeTest, SaysWhatWasLoaded) {
  const std::vector<Layer> parts = {make_layer({.bits = 4,
                                                .k = 100,
                                                .n = 20,
                                                .group_size = 64,
                                                .zeros = Zeros::kAsymmetricV1,
                                                .order = Order::kActOrder,
                                                .scales = DType::kBFloat16,
                                                .bias = DType::kFloat32}),
                                    make_layer({.bits = 4,
                                                .k = 100,
                                                .n = 40,
                                                .group_size = 64,
                                                .zeros = Zeros::kSymmetricV2,
                                                .scales = DType::kBFloat16,
                                                .bias = DType::kFloat32})};
  CpuBackend::Context context(1);
  GptqSpec spec = parts[0].spec();
  spec.symmetry = Symmetry::kUnknown;
  const Description d = CpuBackend::load_gptq(context, test::fused(parts), spec)->describe();
  EXPECT_EQ(d.backend, "cpu");
  EXPECT_EQ(d.device, "cpu");
  EXPECT_EQ(d.bits, 4);
  EXPECT_EQ(d.group_size, 64);
  EXPECT_EQ(d.k, 100);
  EXPECT_EQ(d.n, 60);
  EXPECT_EQ(d.k_padded, 104);
  EXPECT_EQ(d.n_padded, 32 + 48);
  EXPECT_EQ(d.num_experts, 1);
  EXPECT_EQ(d.fused, (std::vector<std::int64_t>{20, 40}));
  EXPECT_FALSE(d.symmetric);
  EXPECT_TRUE(d.act_order);
  EXPECT_TRUE(d.bias);
  EXPECT_TRUE(d.batch_invariant);
  EXPECT_EQ(d.zero_points, "mixed");
  EXPECT_EQ(d.scale_dtype, "bfloat16");
  EXPECT_GT(d.packed_bytes, 80 * 104 / 2);
  const auto bytes = [](const Layer& layer) {
    return static_cast<std::int64_t>(layer.qweight.size() * 4 + layer.qzeros.size() * 4 +
                                     layer.scales.size() + layer.bias.size());
  };
  EXPECT_EQ(d.checkpoint_bytes, bytes(parts[0]) + bytes(parts[1]) + 100 * 4);
}

}  // namespace
}  // namespace marlinq
