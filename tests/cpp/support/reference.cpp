#include "support/reference.hpp"

#include <cstring>

namespace marlinq::test {

namespace {

std::uint32_t read_word(const HostTensor& tensor, std::int64_t index) {
  std::uint32_t word = 0;
  std::memcpy(&word, static_cast<const unsigned char*>(tensor.data) + index * 4, sizeof word);
  return word;
}

std::int64_t group_at(const GptqModule& module, std::int64_t group_size, std::int64_t k) {
  if (!module.g_idx.present()) return k / group_size;
  const auto stored = static_cast<std::int64_t>(read_element(module.g_idx.data, DType::kInt32, k));
  return stored < 0 ? stored + module.scales.shape[0] : stored;
}

}  // namespace

std::uint32_t code_at(const HostTensor& qweight, int bits, std::int64_t k, std::int64_t n) {
  std::uint32_t code = 0;
  for (int bit = 0; bit < bits; ++bit) {
    const std::int64_t place = k * bits + bit;
    const std::uint32_t word = read_word(qweight, place / 32 * qweight.shape[1] + n);
    code |= (word >> (place % 32) & 1U) << bit;
  }
  return code;
}

std::uint32_t zero_field_at(const HostTensor& qzeros, int bits, std::int64_t g, std::int64_t n) {
  std::uint32_t field = 0;
  for (int bit = 0; bit < bits; ++bit) {
    const std::int64_t place = n * bits + bit;
    const std::uint32_t word = read_word(qzeros, g * qzeros.shape[1] + place / 32);
    field |= (word >> (place % 32) & 1U) << bit;
  }
  return field;
}

std::uint32_t zero_point_at(const HostTensor& qzeros, int bits, ZeroPoints convention,
                            std::int64_t g, std::int64_t n) {
  const std::uint32_t size = 1U << bits;
  if (!qzeros.present()) return size / 2;
  if (convention == ZeroPoints::kV2) return zero_field_at(qzeros, bits, g, n);
  if (bits == 3) return (zero_field_at(qzeros, bits, g, n) + 1) % size;
  const std::int64_t fields = 32 / bits;
  std::uint32_t carry = 0;
  std::uint32_t zero = 0;
  for (std::int64_t column = n / fields * fields; column <= n; ++column) {
    const std::uint32_t sum = zero_field_at(qzeros, bits, g, column) + 1 + carry;
    zero = sum % size;
    carry = sum / size;
  }
  return zero;
}

ZeroPoints expected_convention(const GptqModule& module, const GptqSpec& spec) {
  if (spec.zero_points != ZeroPoints::kAuto) return spec.zero_points;
  const ZeroPoints label = spec.labelled == ZeroPoints::kAuto ? ZeroPoints::kV1 : spec.labelled;
  if (!module.qzeros.present() || spec.symmetry == Symmetry::kAsymmetric) return label;
  const std::uint32_t middle = 1U << (spec.bits - 1);
  bool all_below = true;
  bool all_middle = true;
  for (std::int64_t g = 0; g < module.scales.shape[0]; ++g) {
    for (std::int64_t n = 0; n < module.scales.shape[1]; ++n) {
      const std::uint32_t field = zero_field_at(module.qzeros, spec.bits, g, n);
      all_below = all_below && field == middle - 1;
      all_middle = all_middle && field == middle;
    }
  }
  return all_below ? ZeroPoints::kV1 : all_middle ? ZeroPoints::kV2 : label;
}

Dense dequantise(const GptqModule& module, int bits, std::int64_t group_size, std::int64_t k,
                 ZeroPoints convention) {
  const std::int64_t n = module.qweight.shape[1];
  const std::int64_t rows_of_group = group_size == -1 ? k : group_size;
  Dense dense{.k = k, .n = n, .w = {}, .bias = {}};
  const std::int64_t groups = module.scales.shape[0];
  std::vector<double> zeros(static_cast<std::size_t>(groups * n));
  for (std::int64_t g = 0; g < groups; ++g) {
    for (std::int64_t column = 0; column < n; ++column) {
      zeros[static_cast<std::size_t>(g * n + column)] =
          zero_point_at(module.qzeros, bits, convention, g, column);
    }
  }
  dense.w.reserve(static_cast<std::size_t>(k * n));
  for (std::int64_t row = 0; row < k; ++row) {
    const std::int64_t g = group_at(module, rows_of_group, row);
    for (std::int64_t column = 0; column < n; ++column) {
      const double scale = read_element(module.scales.data, module.scales.dtype, g * n + column);
      dense.w.push_back((code_at(module.qweight, bits, row, column) -
                         zeros[static_cast<std::size_t>(g * n + column)]) *
                        scale);
    }
  }
  for (std::int64_t column = 0; column < n; ++column) {
    dense.bias.push_back(
        module.bias.present() ? read_element(module.bias.data, module.bias.dtype, column) : 0.0);
  }
  return dense;
}

Dense fuse(const std::vector<Dense>& parts) {
  Dense all{.k = parts.front().k, .n = 0, .w = {}, .bias = {}};
  for (const Dense& part : parts) all.n += part.n;
  for (std::int64_t row = 0; row < all.k; ++row) {
    for (const Dense& part : parts) {
      all.w.insert(all.w.end(), part.w.begin() + row * part.n, part.w.begin() + (row + 1) * part.n);
    }
  }
  for (const Dense& part : parts) {
    all.bias.insert(all.bias.end(), part.bias.begin(), part.bias.end());
  }
  return all;
}

void accumulate(const std::vector<double>& x, std::int64_t stride, std::int64_t m,
                const Dense& dense, std::int64_t first, std::int64_t last, std::vector<double>& y) {
  for (std::int64_t row = 0; row < m; ++row) {
    double* sums = y.data() + row * dense.n;
    for (std::int64_t k = first; k < last; ++k) {
      const double value = x[static_cast<std::size_t>(row * stride + k)];
      const double* weights = dense.w.data() + k * dense.n;
      for (std::int64_t n = 0; n < dense.n; ++n) sums[n] += value * weights[n];
    }
  }
}

Product multiply(const std::vector<double>& x, std::int64_t m, const Dense& dense) {
  Product product{.m = m, .n = dense.n, .y = {}, .energy = {}};
  double bias_energy = 0;
  for (const double b : dense.bias) bias_energy += b * b;
  std::vector<double> energy_of_row;
  for (std::int64_t k = 0; k < dense.k; ++k) {
    double sum = 0;
    for (std::int64_t n = 0; n < dense.n; ++n) sum += dense.at(k, n) * dense.at(k, n);
    energy_of_row.push_back(sum);
  }
  for (std::int64_t row = 0; row < m; ++row) {
    product.y.insert(product.y.end(), dense.bias.begin(), dense.bias.end());
    double energy = bias_energy;
    for (std::int64_t k = 0; k < dense.k; ++k) {
      const double value = x[static_cast<std::size_t>(row * dense.k + k)];
      energy += value * value * energy_of_row[static_cast<std::size_t>(k)];
    }
    product.energy.push_back(energy);
  }
  accumulate(x, dense.k, m, dense, 0, dense.k, product.y);
  return product;
}

}  // namespace marlinq::test
