// Activations and outputs between float32 and the 16-bit formats; everything has internal linkage.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/half.hpp"
#include "cpu/isa_table.hpp"

namespace marlinq::cpu::MARLINQ_CPU_ISA {
namespace {

void to_float(FloatType type, const std::uint8_t* source, float* target, std::int64_t count) {
  if (type == FloatType::kF32) {
    std::memcpy(target, source, static_cast<std::size_t>(count) * 4);
    return;
  }
  std::int64_t i = 0;
  if (type == FloatType::kF16) {
    for (; i + Vec::kLanes <= count; i += Vec::kLanes)
      Vec::store_unaligned(target + i, Vec::load_float16(source + 2 * i));
  }
  for (; i < count; ++i) {
    std::uint16_t bits;
    std::memcpy(&bits, source + 2 * i, sizeof bits);
    target[i] = type == FloatType::kF16 ? float16_to_float(bits) : bfloat16_to_float(bits);
  }
}

void from_float(FloatType type, const float* source, std::uint8_t* target, std::int64_t count) {
  if (type == FloatType::kF32) {
    std::memcpy(target, source, static_cast<std::size_t>(count) * 4);
    return;
  }
  std::int64_t i = 0;
  if (type == FloatType::kF16) {
    for (; i + Vec::kLanes <= count; i += Vec::kLanes)
      Vec::store_float16(target + 2 * i, Vec::load_unaligned(source + i));
  }
  for (; i < count; ++i) {
    const std::uint16_t bits =
        type == FloatType::kF16 ? float_to_float16(source[i]) : float_to_bfloat16(source[i]);
    std::memcpy(target + 2 * i, &bits, sizeof bits);
  }
}

}  // namespace
}  // namespace marlinq::cpu::MARLINQ_CPU_ISA
