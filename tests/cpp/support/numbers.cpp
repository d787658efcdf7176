#include "support/numbers.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace marlinq::test {

double decode_float(std::uint32_t bits, FloatFormat format) {
  const std::uint32_t mantissa = bits & ((1U << format.mantissa_bits) - 1U);
  const std::uint32_t exponent = (bits >> format.mantissa_bits) & format.all_ones_exponent();
  const bool negative = (bits >> (format.mantissa_bits + format.exponent_bits) & 1U) != 0;
  double magnitude = 0;
  if (exponent == format.all_ones_exponent()) {
    magnitude = mantissa != 0 ? std::numeric_limits<double>::quiet_NaN()
                              : std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    magnitude = std::ldexp(mantissa, 1 - format.bias() - format.mantissa_bits);
  } else {
    magnitude = std::ldexp(mantissa + (1U << format.mantissa_bits),
                           static_cast<int>(exponent) - format.bias() - format.mantissa_bits);
  }
  return negative ? -magnitude : magnitude;
}

std::uint32_t encode_float(double value, FloatFormat format) {
  const std::uint32_t sign =
      std::signbit(value) ? 1U << (format.mantissa_bits + format.exponent_bits) : 0U;
  const std::uint32_t infinity = format.all_ones_exponent() << format.mantissa_bits;
  if (std::isnan(value)) return sign | infinity | 1U << (format.mantissa_bits - 1);
  const double magnitude = std::fabs(value);
  if (std::isinf(value)) return sign | infinity;
  if (magnitude == 0) return sign;
  const int leading = std::max(std::ilogb(magnitude), 1 - format.bias());
  const int unit = leading - format.mantissa_bits;  // exponent of the last place
  const double steps = std::nearbyint(std::ldexp(magnitude, -unit));
  if (std::ldexp(steps, unit) >= std::ldexp(1.0, format.bias() + 1)) return sign | infinity;
  const auto whole = static_cast<std::uint32_t>(steps);
  const std::uint32_t hidden = 1U << format.mantissa_bits;
  if (whole < hidden) return sign | whole;  // subnormal
  return sign | ((static_cast<std::uint32_t>(leading + format.bias()) << format.mantissa_bits) +
                 (whole - hidden));
}

double read_element(const void* data, DType dtype, std::int64_t index) {
  const auto* at =
      static_cast<const unsigned char*>(data) + static_cast<std::size_t>(index) * size_of(dtype);
  switch (dtype) {
    case DType::kFloat32: {
      float value = 0;
      std::memcpy(&value, at, sizeof value);
      return static_cast<double>(value);
    }
    case DType::kInt32: {
      std::int32_t value = 0;
      std::memcpy(&value, at, sizeof value);
      return value;
    }
    case DType::kInt64: {
      std::int64_t value = 0;
      std::memcpy(&value, at, sizeof value);
      return static_cast<double>(value);
    }
    case DType::kFloat16:
    case DType::kBFloat16:
      break;
  }
  std::uint16_t value = 0;
  std::memcpy(&value, at, sizeof value);
  return decode_float(value, format_of(dtype));
}

void write_element(void* data, DType dtype, std::int64_t index, double value) {
  auto* at = static_cast<unsigned char*>(data) + static_cast<std::size_t>(index) * size_of(dtype);
  switch (dtype) {
    case DType::kFloat32: {
      const auto rounded = static_cast<float>(value);
      std::memcpy(at, &rounded, sizeof rounded);
      return;
    }
    case DType::kInt32: {
      const auto whole = static_cast<std::int32_t>(value);
      std::memcpy(at, &whole, sizeof whole);
      return;
    }
    case DType::kInt64: {
      const auto whole = static_cast<std::int64_t>(value);
      std::memcpy(at, &whole, sizeof whole);
      return;
    }
    case DType::kFloat16:
    case DType::kBFloat16:
      break;
  }
  const auto bits = static_cast<std::uint16_t>(encode_float(value, format_of(dtype)));
  std::memcpy(at, &bits, sizeof bits);
}

}  // namespace marlinq::test
