// Packed codes to fragments of q - zero, exact in fp16 and in bf16, divided by powers of two that
// ZeroPair knows, one for the lower and one for the upper features of a lane (g, g + 8).
//
// 4 bits (arch/sm80/layout.hpp has the places): the bits of codes are taken for subnormal numbers, which a multiplication
// by the largest power of two brings back among the others, and an addition of the zero point in the same instruction
// completes. So no code but those 8 bits further on needs a shift, which would take the pipe that masking takes, though
// bf16 has 7 bits of mantissa: the nibble in bits 0 to 3 of a half is q, by 2^-24 in fp16 and by 2^-133 in bf16; bit 15
// and bits 4 to 6 are the sign and the magnitude t of q - 7.5 = +-(t + 1/2), bit 3 being set for the 1/2. All sums are
// of numbers with few bits, hence exact.
// 8 bits: fp16 by bytes permuted into 0x64xx, minus 1024 + z; bf16 through float32, as 128 + q does not fit 8 bits.
//
// Where the zero point is left to the sums, Σ (q - z) x = Σ q x - z Σ x, a code needs no subtraction
// (OffsetCodes). fp16: subnormal numbers as they are. bf16: the nibble or-ed into 128 is 128 + q, since products of
// subnormal numbers would be lost.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace marlinq::cuda {

__device__ __forceinline__ uint32_t and_or(uint32_t value, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(value), "r"(mask), "r"(bits));
  return result;
}

/// a * b + c of pairs.
template <class T>
__device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  if constexpr (std::is_same_v<T, __half>) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  }
  return result;
}

/// The codes of 4 bits of a word: the lower and the upper features of a lane, for the first 8 rows of a step; those of
/// the next 8 are in the same places of next_codes().
constexpr uint32_t kLowerCodes = 0x000f000fu;
constexpr uint32_t kUpperCodes = 0x80708070u;
constexpr uint32_t kUpperHalf = 0x00080008u;  // the 1/2 that goes with their magnitudes
__device__ __forceinline__ uint32_t next_codes(uint32_t word) {
  return __funnelshift_r(word, word, 8);
}

/// The largest power of two, twice, and its negative.
template <class T>
constexpr uint32_t kLargest = std::is_same_v<T, __half> ? 0x78007800u : 0x7f007f00u;
template <class T>
constexpr uint32_t kMinusLargest = kLargest<T> | 0x80008000u;

/// What decode() leaves codes divided by: those of element i of an accumulator, i of 0 and 1 (feature g), 2 and 3
/// (g + 8) or more.
template <int kUnit, int kUpperUnit>
struct CodeUnits {
  __host__ __device__ static constexpr float unit(int i) {
    return i / 2 % 2 == 0 ? static_cast<float>(kUnit) : static_cast<float>(kUpperUnit);
  }
};

/// A zero point of two, twice as 16 bits: that of the lower or of the upper feature of a lane. Pairs have them in their lowest bytes.
__device__ __forceinline__ uint32_t lower_zero(uint32_t pair) {
  return __byte_perm(pair, 0, 0x4040);
}
__device__ __forceinline__ uint32_t upper_zero(uint32_t pair) {
  return __byte_perm(pair, 0, 0x4141);
}

/// The zero points of the two features of a lane, in the form that decode() wants.
template <class T, int kBits>
struct ZeroPair;

template <class T>
struct ZeroPair<T, 4>
    : std::conditional_t<std::is_same_v<T, __half>, CodeUnits<512, 32>, CodeUnits<64, 4>> {
  uint32_t low, high;  // -z and 7.5 - z, by those units
  __device__ __forceinline__ void set(uint32_t pair) {
    constexpr uint32_t kMiddle = std::is_same_v<T, __half> ? 0x33803380u : 0x3ff03ff0u;  // 7.5
    low = multiply_add<T>(lower_zero(pair), kMinusLargest<T>, 0);
    high = multiply_add<T>(upper_zero(pair) << 4, kMinusLargest<T>, kMiddle);
  }
};

template <>
struct ZeroPair<__half, 8> : CodeUnits<1, 1> {
  uint32_t low, high;
  __device__ __forceinline__ void set(uint32_t pair) {
    low = __byte_perm(pair, 0x64646464u, 0x4040);
    high = __byte_perm(pair, 0x64646464u, 0x4141);
  }
};

template <>
struct ZeroPair<__nv_bfloat16, 8> : CodeUnits<1, 1> {
  float low, high;
  __device__ __forceinline__ void set(uint32_t pair) {
    low = __uint_as_float(__byte_perm(pair, 0x4b000000u, 0x7540));  // 2^23 + z
    high = __uint_as_float(__byte_perm(pair, 0x4b000000u, 0x7541));
  }
};

__device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

/// The fragment of 16 rows from the words of one lane: 4 bits take one word, 8 bits two.
template <class T>
__device__ __forceinline__ void decode(uint32_t (&a)[4], const uint32_t* words,
                                       const ZeroPair<T, 4>& zero, T) {
  const uint32_t next = next_codes(words[0]);
  a[0] = multiply_add<T>(words[0] & kLowerCodes, kLargest<T>, zero.low);
  a[1] = multiply_add<T>(and_or(words[0], kUpperCodes, kUpperHalf), kLargest<T>, zero.high);
  a[2] = multiply_add<T>(next & kLowerCodes, kLargest<T>, zero.low);
  a[3] = multiply_add<T>(and_or(next, kUpperCodes, kUpperHalf), kLargest<T>, zero.high);
}

__device__ __forceinline__ void decode(uint32_t (&a)[4], const uint32_t* words,
                                       const ZeroPair<__half, 8>& zero, __half) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    a[2 * h] = subtract(__byte_perm(words[h], 0x64646464u, 0x4140), zero.low);
    a[2 * h + 1] = subtract(__byte_perm(words[h], 0x64646464u, 0x4342), zero.high);
  }
}

__device__ __forceinline__ void decode(uint32_t (&a)[4], const uint32_t* words,
                                       const ZeroPair<__nv_bfloat16, 8>& zero, __nv_bfloat16) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float value[4];
#pragma unroll
    for (int byte = 0; byte < 4; ++byte) {
      const float biased =
          __uint_as_float(__byte_perm(words[h], 0x4b000000u, 0x7540 + byte));  // 2^23 + q
      value[byte] = biased - (byte < 2 ? zero.low : zero.high);
    }
    const __nv_bfloat162 low = __floats2bfloat162_rn(value[0], value[1]);
    const __nv_bfloat162 high = __floats2bfloat162_rn(value[2], value[3]);
    a[2 * h] = reinterpret_cast<const uint32_t&>(low);
    a[2 * h + 1] = reinterpret_cast<const uint32_t&>(high);
  }
}

/// Zero points for sums of OffsetCodes.
struct ZeroFloats {
  float low, high;
  __device__ __forceinline__ void set(uint32_t pair) {
    low = static_cast<float>(pair & 0xffu);
    high = static_cast<float>(pair >> 8);
  }
};

/// Codes are multiplied as q - z.
struct NoOffsetCodes {
  static constexpr bool kHas = false;
};

/// What all float16 codes have in common.
struct SubnormalCodes {
  static constexpr bool kHas = true;
  static constexpr float kOffset = 0.0f;
  static constexpr float kUnit = 0x1p24f;
};

/// Codes of 16 rows as (kOffset + q) / kUnit, or those of the feature 8 above as (kUpperOffset + q) / kUpperUnit.
/// Products with x, by the unit, are (offset + z) Σ x too large.
template <class T, int kBits>
struct OffsetCodes : NoOffsetCodes {};

template <>
struct OffsetCodes<__half, 4> : SubnormalCodes {
  static constexpr float kUpperOffset = -7.5f;
  static constexpr float kUpperUnit = 0x1p20f;
  __device__ __forceinline__ static void decode(uint32_t (&a)[4], const uint32_t* words) {
    const uint32_t next = next_codes(words[0]);
    a[0] = words[0] & kLowerCodes;
    a[1] = and_or(words[0], kUpperCodes, kUpperHalf);
    a[2] = next & kLowerCodes;
    a[3] = and_or(next, kUpperCodes, kUpperHalf);
  }
};

template <>
struct OffsetCodes<__half, 8> : SubnormalCodes {
  static constexpr float kUpperOffset = kOffset;
  static constexpr float kUpperUnit = kUnit;
  __device__ __forceinline__ static void decode(uint32_t (&a)[4], const uint32_t* words) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      a[2 * h] = __byte_perm(words[h], 0, 0x4140);
      a[2 * h + 1] = __byte_perm(words[h], 0, 0x4342);
    }
  }
};

template <>
struct OffsetCodes<__nv_bfloat16, 4> {
  static constexpr bool kHas = true;
  static constexpr float kOffset = 128.0f;
  static constexpr float kUpperOffset = -7.5f;
  static constexpr float kUnit = 1.0f;
  static constexpr float kUpperUnit = 4.0f;
  __device__ __forceinline__ static void decode(uint32_t (&a)[4], const uint32_t* words) {
    using T = __nv_bfloat16;
    constexpr uint32_t kBase = 0x43004300u;
    const uint32_t next = next_codes(words[0]);
    a[0] = and_or(words[0], kLowerCodes, kBase);
    a[2] = and_or(next, kLowerCodes, kBase);
    a[1] = multiply_add<T>(and_or(words[0], kUpperCodes, kUpperHalf), kLargest<T>, 0);
    a[3] = multiply_add<T>(and_or(next, kUpperCodes, kUpperHalf), kLargest<T>, 0);
  }
};

}  // namespace marlinq::cuda
