// The reference that results are compared with: dequantises index by index, bit by bit, from the
// words of the checkpoint, and accumulates in double. Shares no code with the library.
#pragma once

#include <cstdint>
#include <vector>

#include "marlinq/gptq.hpp"
#include "support/numbers.hpp"

namespace marlinq::test {

/// Code of input row k and output column n of qweight [ceil(K * bits / 32), N].
std::uint32_t code_at(const HostTensor& qweight, int bits, std::int64_t k, std::int64_t n);

/// Stored zero-point field of group g and column n of qzeros [G, ceil(N * bits / 32)].
std::uint32_t zero_field_at(const HostTensor& qzeros, int bits, std::int64_t g, std::int64_t n);

/// Zero point of group g and column n. v1 stores one less: in words of 2, 4 and 8 bits one is added
/// to every field of the word, with carry into the next; 3 bits wrap field by field.
std::uint32_t zero_point_at(const HostTensor& qzeros, int bits, ZeroPoints convention,
                            std::int64_t g, std::int64_t n);

/// The convention that gptq.hpp promises for a module.
ZeroPoints expected_convention(const GptqModule& module, const GptqSpec& spec);

/// A dequantised weight, w [k][n], and its bias (zeros where there is none).
struct Dense {
  std::int64_t k = 0;
  std::int64_t n = 0;
  std::vector<double> w;
  std::vector<double> bias;

  double at(std::int64_t row, std::int64_t column) const {
    return w[static_cast<std::size_t>(row * n + column)];
  }
};

Dense dequantise(const GptqModule& module, int bits, std::int64_t group_size, std::int64_t k,
                 ZeroPoints convention);

/// Layers of one k beside each other along N.
Dense fuse(const std::vector<Dense>& parts);

/// y [m][n] = x W^T + bias, and for each row the sum of x^2 w^2 (+ bias^2) over its outputs.
struct Product {
  std::int64_t m = 0;
  std::int64_t n = 0;
  std::vector<double> y;
  std::vector<double> energy;
};

/// Adds x [m][stride] times rows [first, last) of the weight to y [m][n].
void accumulate(const std::vector<double>& x, std::int64_t stride, std::int64_t m,
                const Dense& dense, std::int64_t first, std::int64_t last, std::vector<double>& y);

Product multiply(const std::vector<double>& x, std::int64_t m, const Dense& dense);

}  // namespace marlinq::test
