// Reads and writes one element of an array whose dtype is known at run time. For places that are
// not hot.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/half.hpp"
#include "marlinq/types.hpp"

namespace marlinq {

constexpr bool is_floating(DType dtype) noexcept {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

inline const std::uint8_t* element(const void* data, DType dtype, std::int64_t index) noexcept {
  return static_cast<const std::uint8_t*>(data) + index * static_cast<std::int64_t>(size_of(dtype));
}

/// Element `index` of an f32, f16 or bf16 array of any alignment.
inline float read_float(const void* data, DType dtype, std::int64_t index) noexcept {
  const std::uint8_t* bytes = element(data, dtype, index);
  if (dtype == DType::kFloat32) {
    float value = 0;
    std::memcpy(&value, bytes, sizeof value);
    return value;
  }
  std::uint16_t bits = 0;
  std::memcpy(&bits, bytes, sizeof bits);
  return dtype == DType::kFloat16 ? float16_to_float(bits) : bfloat16_to_float(bits);
}

/// Element `index` of an i32 or i64 array of any alignment.
inline std::int64_t read_integer(const void* data, DType dtype, std::int64_t index) noexcept {
  const std::uint8_t* bytes = element(data, dtype, index);
  if (dtype == DType::kInt64) {
    std::int64_t value = 0;
    std::memcpy(&value, bytes, sizeof value);
    return value;
  }
  std::int32_t value = 0;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

}  // namespace marlinq
