#include "support/generators.hpp"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <utility>

namespace marlinq::test {

std::string describe(const LayerOptions& o) {
  std::ostringstream text;
  text << "bits " << o.bits << ", k " << o.k << ", n " << o.n << ", group " << o.group_size
       << ", zeros " << static_cast<int>(o.zeros) << ", order " << static_cast<int>(o.order)
       << ", scales " << to_string(o.scales) << ", bias "
       << (o.bias ? to_string(*o.bias) : std::string_view("none")) << ", seed " << o.seed;
  return text.str();
}

void put_field(std::uint32_t* words, std::int64_t stride, int bits, std::int64_t index,
               std::uint32_t value) {
  for (int bit = 0; bit < bits; ++bit) {
    const std::int64_t place = index * bits + bit;
    std::uint32_t& word = words[place / 32 * stride];
    word = (word & ~(1U << (place % 32))) | ((value >> bit & 1U) << (place % 32));
  }
}

void pack_zeros(Layer& layer) {
  const LayerOptions& o = layer.options;
  const std::int64_t words = divide_up(o.n * o.bits, 32);
  const std::uint32_t mask = (1U << o.bits) - 1U;
  for (std::int64_t g = 0; g < layer.groups; ++g) {
    std::uint32_t* row = layer.qzeros.data() + g * words;
    for (std::int64_t n = 0; n < o.n; ++n) {
      const std::uint32_t zero = layer.zeros[static_cast<std::size_t>(g * o.n + n)];
      const bool wraps = o.bits == 3 && !is_v2(o.zeros);
      put_field(row, 1, o.bits, n, wraps ? (zero - 1) & mask : zero);
    }
    if (o.bits == 3 || is_v2(o.zeros)) continue;
    for (std::int64_t w = 0; w < words; ++w) row[w] -= 0xFFFFFFFFU / mask;
  }
}

void pack_codes(Layer& layer) {
  const LayerOptions& o = layer.options;
  for (std::int64_t k = 0; k < o.k; ++k) {
    for (std::int64_t n = 0; n < o.n; ++n) {
      put_field(layer.qweight.data() + n, o.n, o.bits, k,
                layer.codes[static_cast<std::size_t>(k * o.n + n)]);
    }
  }
}

Layer make_layer(const LayerOptions& options) {
  Layer layer;
  layer.options = options;
  const LayerOptions& o = options;
  Random random(o.seed);
  const std::int64_t group_size = o.group_size == -1 ? o.k : o.group_size;
  layer.groups = divide_up(o.k, group_size);
  const std::uint32_t middle = 1U << (o.bits - 1);

  layer.qweight.resize(static_cast<std::size_t>(divide_up(o.k * o.bits, 32) * o.n));
  for (std::uint32_t& word : layer.qweight) word = static_cast<std::uint32_t>(random.next());
  layer.codes.resize(static_cast<std::size_t>(o.k * o.n));
  for (std::uint32_t& code : layer.codes) {
    code = static_cast<std::uint32_t>(random.below(std::int64_t{1} << o.bits));
  }
  pack_codes(layer);

  layer.zeros.resize(static_cast<std::size_t>(layer.groups * o.n), middle);
  if (is_asymmetric(o.zeros)) {
    for (std::uint32_t& zero : layer.zeros) {
      zero = static_cast<std::uint32_t>(random.below(std::int64_t{1} << o.bits));
    }
    // One zero point off the middle is enough to be asymmetric, even for a single column.
    layer.zeros.front() = middle - 1;
  }
  if (o.zeros != Zeros::kAbsent) {
    layer.qzeros.resize(static_cast<std::size_t>(layer.groups * divide_up(o.n * o.bits, 32)));
    for (std::uint32_t& word : layer.qzeros) word = static_cast<std::uint32_t>(random.next());
    pack_zeros(layer);
  }

  for (std::int64_t k = 0; k < o.k; ++k) layer.group_of_row.push_back(k / group_size);
  if (o.order == Order::kActOrder || o.order == Order::kNegative) {
    for (std::int64_t k = o.k - 1; k > 0; --k) {
      std::swap(layer.group_of_row[static_cast<std::size_t>(k)],
                layer.group_of_row[static_cast<std::size_t>(random.below(k + 1))]);
    }
  }
  if (o.order == Order::kUnbalanced) {  // some groups large, some empty
    for (std::int64_t& group : layer.group_of_row) {
      const double u = random.uniform();
      group = static_cast<std::int64_t>(u * u * static_cast<double>(layer.groups));
    }
  }
  for (const std::int64_t group : layer.group_of_row) {
    const bool negative = o.order == Order::kNegative && random.chance(50);
    layer.g_idx.push_back(static_cast<std::int32_t>(negative ? group - layer.groups : group));
  }

  layer.scales.resize(static_cast<std::size_t>(layer.groups * o.n) * size_of(o.scales));
  for (std::int64_t i = 0; i < layer.groups * o.n; ++i) {
    const double size = 0.08 / static_cast<double>(middle);  // weights of about 0.05
    write_element(layer.scales.data(), o.scales, i, size * std::exp2(random.uniform() * 2 - 1));
  }
  // One that is too small for a GPU to make them all float16.
  if (o.scales == DType::kBFloat16 && o.n >= 16)
    write_element(layer.scales.data(), o.scales, o.n / 2, 0x1p-20);
  if (o.bias) {
    layer.bias.resize(static_cast<std::size_t>(o.n) * size_of(*o.bias));
    for (std::int64_t i = 0; i < o.n; ++i) {
      write_element(layer.bias.data(), *o.bias, i, random.normal());
    }
  }
  return layer;
}

GptqTensors fused(const std::vector<Layer>& parts) {
  GptqTensors tensors;
  for (const Layer& part : parts) tensors.modules.push_back(part.module());
  return tensors;
}

Dense fused_dense(const std::vector<Layer>& parts) {
  std::vector<Dense> dense;
  for (const Layer& part : parts) dense.push_back(part.dense());
  return fuse(dense);
}

Matrix random_matrix(std::int64_t rows, std::int64_t cols, DType dtype, std::uint64_t seed,
                     std::int64_t extra_stride) {
  Matrix matrix(rows, cols, dtype, extra_stride);
  Random random(seed);
  matrix.fill_normal(random);
  return matrix;
}

std::vector<std::vector<int>> pairwise_cover(const std::vector<int>& sizes, std::uint64_t seed) {
  const auto axes = static_cast<int>(sizes.size());
  std::vector<std::pair<std::pair<int, int>, std::pair<int, int>>> missing;
  for (int a = 0; a < axes; ++a) {
    for (int b = a + 1; b < axes; ++b) {
      for (int i = 0; i < sizes[static_cast<std::size_t>(a)]; ++i) {
        for (int j = 0; j < sizes[static_cast<std::size_t>(b)]; ++j) {
          missing.push_back({{a, i}, {b, j}});
        }
      }
    }
  }
  Random random(seed);
  std::vector<std::vector<int>> rows;
  const auto covers = [](const std::vector<int>& row, const auto& pair) {
    return row[static_cast<std::size_t>(pair.first.first)] == pair.first.second &&
           row[static_cast<std::size_t>(pair.second.first)] == pair.second.second;
  };
  while (!missing.empty()) {
    std::vector<int> best;
    std::ptrdiff_t most = 0;
    for (int trial = 0; trial < 40; ++trial) {
      std::vector<int> row;
      for (const int size : sizes) row.push_back(static_cast<int>(random.below(size)));
      const auto& wanted = missing[static_cast<std::size_t>(trial) % missing.size()];
      row[static_cast<std::size_t>(wanted.first.first)] = wanted.first.second;
      row[static_cast<std::size_t>(wanted.second.first)] = wanted.second.second;
      const auto count = std::count_if(missing.begin(), missing.end(),
                                       [&](const auto& pair) { return covers(row, pair); });
      if (count > most) {
        most = count;
        best = row;
      }
    }
    std::erase_if(missing, [&](const auto& pair) { return covers(best, pair); });
    rows.push_back(best);
  }
  return rows;
}

GptqModule Layer::module() const {
  const LayerOptions& o = options;
  GptqModule m;
  m.name = o.name;
  m.qweight = {
      qweight.data(), qweight.size() * 4, DType::kInt32, {divide_up(o.k * o.bits, 32), o.n}, 2};
  m.scales = {scales.data(), scales.size(), o.scales, {groups, o.n}, 2};
  if (o.zeros != Zeros::kAbsent) {
    m.qzeros = {
        qzeros.data(), qzeros.size() * 4, DType::kInt32, {groups, divide_up(o.n * o.bits, 32)}, 2};
  }
  if (o.order != Order::kNone) {
    m.g_idx = {g_idx.data(), g_idx.size() * 4, DType::kInt32, {o.k, 0}, 1};
  }
  if (o.bias) m.bias = {bias.data(), bias.size(), *o.bias, {o.n, 0}, 1};
  return m;
}

GptqSpec Layer::spec() const {
  GptqSpec s;
  s.bits = options.bits;
  s.group_size = options.group_size;
  s.k = options.k;
  s.labelled = is_v2(options.zeros) ? ZeroPoints::kV2 : ZeroPoints::kV1;
  s.symmetry = is_asymmetric(options.zeros) ? Symmetry::kAsymmetric : Symmetry::kSymmetric;
  return s;
}

Dense Layer::dense() const {
  return dequantise(module(), options.bits, options.group_size, options.k, convention());
}

Matrix::Matrix(std::int64_t rows, std::int64_t cols, DType dtype, std::int64_t extra_stride)
    : rows_(rows), cols_(cols), stride_(cols + extra_stride), dtype_(dtype) {
  bytes_.assign(static_cast<std::size_t>(rows * stride_) * size_of(dtype) + 2 * kGuardBytes,
                kGuard);
}

double Matrix::at(std::int64_t row, std::int64_t col) const {
  return read_element(data(), dtype_, row * stride_ + col);
}

void Matrix::set(std::int64_t row, std::int64_t col, double value) {
  write_element(data(), dtype_, row * stride_ + col, value);
}

void Matrix::fill_normal(Random& random, double deviation) {
  for (std::int64_t i = 0; i < rows_; ++i) {
    for (std::int64_t j = 0; j < cols_; ++j) set(i, j, random.normal() * deviation);
  }
}

void Matrix::fill(double value) {
  for (std::int64_t i = 0; i < rows_; ++i) {
    for (std::int64_t j = 0; j < cols_; ++j) set(i, j, value);
  }
}

std::vector<double> Matrix::values(std::int64_t rows) const {
  std::vector<double> all;
  all.reserve(static_cast<std::size_t>(rows * cols_));
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < cols_; ++j) all.push_back(at(i, j));
  }
  return all;
}

std::vector<unsigned char> Matrix::row_bytes(std::int64_t first, std::int64_t count) const {
  std::vector<unsigned char> all;
  const std::size_t width = static_cast<std::size_t>(cols_) * size_of(dtype_);
  for (std::int64_t i = first; i < first + count; ++i) {
    const unsigned char* row = row_at(i);
    all.insert(all.end(), row, row + width);
  }
  return all;
}

bool Matrix::guards_intact(std::int64_t written) const {
  const std::size_t width = static_cast<std::size_t>(cols_) * size_of(dtype_);
  std::vector<bool> element(bytes_.size(), false);
  for (std::int64_t i = 0; i < written; ++i) {
    const auto first = row_at(i) - bytes_.data();
    std::fill_n(element.begin() + first, width, true);
  }
  for (std::size_t i = 0; i < bytes_.size(); ++i) {
    if (!element[i] && bytes_[i] != kGuard) return false;
  }
  return true;
}

double Random::normal() {
  constexpr double kTwoPi = 6.283185307179586;
  return std::sqrt(-2.0 * std::log(1.0 - uniform())) * std::cos(kTwoPi * uniform());
}

}  // namespace marlinq::test
