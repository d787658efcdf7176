// Floating-point formats from their definition, and reading of one element of an array. Written
// from the formats, not from the library: the tests judge the library's conversions by these.
#pragma once

#include <cstdint>

#include "marlinq/types.hpp"

namespace marlinq::test {

struct FloatFormat {
  int exponent_bits;
  int mantissa_bits;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  std::uint32_t all_ones_exponent() const { return (1U << exponent_bits) - 1U; }
};

inline constexpr FloatFormat kHalf = {5, 10};
inline constexpr FloatFormat kBrain = {8, 7};

/// The number that `bits` stands for.
double decode_float(std::uint32_t bits, FloatFormat format);

/// The nearest number of the format, ties to the even one; beyond the largest by half a step or
/// more: infinity.
std::uint32_t encode_float(double value, FloatFormat format);

inline const FloatFormat& format_of(DType dtype) {
  return dtype == DType::kFloat16 ? kHalf : kBrain;
}

/// Element `index` of an array of any dtype and alignment.
double read_element(const void* data, DType dtype, std::int64_t index);

/// Rounds `value` to `dtype` and stores it as element `index`.
void write_element(void* data, DType dtype, std::int64_t index, double value);

}  // namespace marlinq::test
