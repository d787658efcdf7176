// Random GPTQ layers of any shape and format, packed by code of its own, and random matrices with
// guard bytes around every row. Everything follows from a seed, the same on every platform.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "marlinq/gptq.hpp"
#include "support/numbers.hpp"
#include "support/reference.hpp"

namespace marlinq::test {

/// SplitMix64.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next() {
    state_ += 0x9E3779B97F4A7C15ULL;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
  }
  /// In [0, count).
  std::int64_t below(std::int64_t count) {
    return static_cast<std::int64_t>(next() % static_cast<std::uint64_t>(count));
  }
  bool chance(int percent) { return below(100) < percent; }
  /// In [0, 1).
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  double normal();
  template <class T>
  const T& pick(const std::vector<T>& values) {
    return values[static_cast<std::size_t>(below(static_cast<std::int64_t>(values.size())))];
  }

 private:
  std::uint64_t state_;
};

enum class Zeros { kAbsent, kSymmetricV1, kSymmetricV2, kAsymmetricV1, kAsymmetricV2 };
enum class Order { kNone, kTrivial, kActOrder, kUnbalanced, kNegative };

constexpr bool is_v2(Zeros zeros) {
  return zeros == Zeros::kSymmetricV2 || zeros == Zeros::kAsymmetricV2;
}
constexpr bool is_asymmetric(Zeros zeros) {
  return zeros == Zeros::kAsymmetricV1 || zeros == Zeros::kAsymmetricV2;
}

struct LayerOptions {
  int bits = 4;
  std::int64_t k = 128;
  std::int64_t n = 64;
  std::int64_t group_size = 128;
  Zeros zeros = Zeros::kSymmetricV1;
  Order order = Order::kNone;
  DType scales = DType::kFloat16;
  std::optional<DType> bias = std::nullopt;
  std::uint64_t seed = 1;
  std::string name = "layer";
};

std::string describe(const LayerOptions& o);

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Puts field `index` of a row of packed words.
void put_field(std::uint32_t* words, std::int64_t stride, int bits, std::int64_t index,
               std::uint32_t value);

/// One module that owns its tensors. Codes, zero points and groups are kept as they were drawn.
struct Layer {
  LayerOptions options;
  std::int64_t groups = 1;
  std::vector<std::uint32_t> codes;  // [k][n]
  std::vector<std::uint32_t> zeros;  // [groups][n]
  std::vector<std::int64_t> group_of_row;

  std::vector<std::uint32_t> qweight;
  std::vector<std::uint32_t> qzeros;
  std::vector<std::int32_t> g_idx;
  std::vector<unsigned char> scales;
  std::vector<unsigned char> bias;

  GptqModule module() const;
  GptqTensors tensors() const { return GptqTensors(module()); }
  /// What a checkpoint's configuration would say.
  GptqSpec spec() const;
  ZeroPoints convention() const { return is_v2(options.zeros) ? ZeroPoints::kV2 : ZeroPoints::kV1; }
  Dense dense() const;
};

/// Packs `layer.zeros` in the layer's convention; a zero point of 0 borrows, as today's writers do.
/// Fields past the last column hold what they held.
void pack_zeros(Layer& layer);

void pack_codes(Layer& layer);

/// Draws a layer. Fields of padding are random too: a reader must not look at them.
Layer make_layer(const LayerOptions& options);

/// Fused modules; the layers must outlive the result.
GptqTensors fused(const std::vector<Layer>& parts);

Dense fused_dense(const std::vector<Layer>& parts);

/// A row-major matrix in host memory with guard bytes before, after and between its rows.
class Matrix {
 public:
  Matrix(std::int64_t rows, std::int64_t cols, DType dtype, std::int64_t extra_stride = 0);

  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }
  DType dtype() const { return dtype_; }
  void* data() { return bytes_.data() + kGuardBytes; }
  const void* data() const { return bytes_.data() + kGuardBytes; }

  MatrixView view() { return {data(), dtype_, {}, rows_, cols_, stride_}; }
  ConstMatrixView view() const { return {data(), dtype_, {}, rows_, cols_, stride_}; }
  ConstMatrixView input() const { return view(); }

  /// All bytes, guards included, and the view of a copy of them elsewhere.
  void* storage() { return bytes_.data(); }
  const void* storage() const { return bytes_.data(); }
  std::int64_t storage_bytes() const { return static_cast<std::int64_t>(bytes_.size()); }
  MatrixView view_at(void* copy, Device device) const {
    return {static_cast<unsigned char*>(copy) + kGuardBytes, dtype_, device, rows_, cols_, stride_};
  }

  double at(std::int64_t row, std::int64_t col) const;
  void set(std::int64_t row, std::int64_t col, double value);
  void fill_normal(Random& random, double deviation = 1.0);
  void fill(double value);

  /// The first `rows` rows as doubles.
  std::vector<double> values(std::int64_t rows) const;
  std::vector<double> values() const { return values(rows_); }

  /// Bytes of the elements of rows [first, first + count).
  std::vector<unsigned char> row_bytes(std::int64_t first, std::int64_t count) const;

  /// True when nothing outside the elements of the first `written` rows has changed.
  bool guards_intact(std::int64_t written) const;
  bool guards_intact() const { return guards_intact(rows_); }

 private:
  static constexpr std::size_t kGuardBytes = 128;
  static constexpr unsigned char kGuard = 0xA5;

  const unsigned char* row_at(std::int64_t row) const {
    return bytes_.data() + kGuardBytes + static_cast<std::size_t>(row * stride_) * size_of(dtype_);
  }

  std::int64_t rows_;
  std::int64_t cols_;
  std::int64_t stride_;
  DType dtype_;
  std::vector<unsigned char> bytes_;
};

Matrix random_matrix(std::int64_t rows, std::int64_t cols, DType dtype, std::uint64_t seed,
                     std::int64_t extra_stride = 0);

/// Rows of indices into axes of the given sizes, such that every pair of values of any two axes
/// occurs together in some row.
std::vector<std::vector<int>> pairwise_cover(const std::vector<int>& sizes, std::uint64_t seed);

}  // namespace marlinq::test
