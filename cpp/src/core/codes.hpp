// Reads packed codes and zero points, of any bit width, from bytes of any alignment.
// A packed axis is a little-endian bit stream of 32-bit words: code i has bits [i * b, (i + 1) * b)
// of it, which for 2, 4 and 8 bits means low field first and for 3 bits that some codes straddle
// two words.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/integers.hpp"
#include "marlinq/gptq.hpp"

namespace marlinq {

inline std::uint32_t load_word(const std::uint8_t* words, std::int64_t index) noexcept {
  std::uint32_t word = 0;
  std::memcpy(&word, words + index * 4, sizeof word);
  return word;
}

/// Words that hold `codes` codes of `bits` bits.
constexpr std::int64_t packed_words(std::int64_t codes, int bits) noexcept {
  return ceil_div(codes * bits, 32);
}

/// qweight is [packed_words(k), n]. Puts the codes of input row `row`, columns
/// [column, column + count), into words[i] at bit `place`, whose bits there are 0.
inline void place_code_row(const std::uint8_t* qweight, int bits, std::int64_t n, std::int64_t row,
                           std::int64_t column, int count, int place,
                           std::uint32_t* words) noexcept {
  const std::int64_t bit = row * bits;
  const int shift = static_cast<int>(bit % 32);
  const std::uint32_t mask = (1U << bits) - 1U;
  const std::uint8_t* source = qweight + (bit / 32 * n + column) * 4;
  for (int i = 0; i < count; ++i) {
    words[i] |= ((load_word(source, i) >> shift) & mask) << place;
  }
  if (shift + bits > 32) {
    for (int i = 0; i < count; ++i) {
      words[i] |= ((load_word(source, n + i) << (32 - shift)) & mask) << place;
    }
  }
}

/// Field `index` of a packed row of words.
inline std::uint32_t read_field(const std::uint8_t* words, int bits, std::int64_t index) noexcept {
  const std::int64_t bit = index * bits;
  const int shift = static_cast<int>(bit % 32);
  std::uint32_t value = load_word(words, bit / 32) >> shift;
  if (shift + bits > 32) value |= load_word(words, bit / 32 + 1) << (32 - shift);
  return value & ((1U << bits) - 1U);
}

/// Zero points of one group, columns [column, column + count), each in [0, 2^bits).
/// v1 stores z - 1. Writers subtract the repeated 1 from the whole word, so that a zero point of 0
/// borrows from the next field; adding it back modulo 2^32 undoes that. 3 bits are written field by
/// field.
inline void read_zero_points(const ValidatedModule& module, int bits, std::int64_t group,
                             std::int64_t column, int count, std::uint8_t* zeros) noexcept {
  if (module.qzeros == nullptr) {
    std::memset(zeros, 1 << (bits - 1), static_cast<std::size_t>(count));
    return;
  }
  const std::uint8_t* words = module.qzeros + group * packed_words(module.n, bits) * 4;
  const std::uint32_t mask = (1U << bits) - 1U;
  const std::uint32_t one = module.zero_points == ZeroPoints::kV1 ? 1U : 0U;
  if (bits == 3) {
    for (int i = 0; i < count; ++i) {
      zeros[i] = static_cast<std::uint8_t>((read_field(words, bits, column + i) + one) & mask);
    }
    return;
  }
  const std::uint32_t repeated_one = one * (0xFFFFFFFFU / mask);
  for (int i = 0; i < count; ++i) {
    const std::int64_t bit = (column + i) * bits;
    zeros[i] = static_cast<std::uint8_t>(
        ((load_word(words, bit / 32) + repeated_one) >> (bit % 32)) & mask);
  }
}

}  // namespace marlinq
