// Packed codes to fragments of q - zero, exact in fp16 and in bf16.
//
// fp16, 4 bits: a nibble or-ed into 0x6400 is 1024 + q, or 1024 + 16 q for the nibble above it, so
// two nibbles cost no shift: subtract 1024 + z, or multiply by 1/16 and subtract 64 + z. bf16 has 7
// mantissa bits: 0x4300 is 128 + q and each nibble needs its shift. All sums are of integers below
// 2^11 (fp16) or 2^8 (bf16), hence exact. 8 bits: fp16 by bytes permuted into 0x64xx; bf16 through
// float32, as 128 + q does not fit 8 bits.
//
// Where the zero point is left to the sums, Σ (q - z) x = Σ q x - z Σ x, a code needs no subtraction
// (OffsetCodes). fp16: the bits of q alone are the subnormal number q 2^-24, or 16 q 2^-24 for the nibble
// above, a unit for each of a lane's two features. bf16: 128 + q.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace marlinq::cuda {

__device__ __forceinline__ uint32_t and_or(uint32_t value, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(value), "r"(mask), "r"(bits));
  return result;
}

/// The zero points of the two features of a lane, in the form that decode() wants.
template <class T, int kBits>
struct ZeroPair;

template <>
struct ZeroPair<__half, 4> {
  uint32_t low, high;
  __device__ __forceinline__ void set(uint32_t feature, uint32_t feature_8) {
    low = (0x6400u + feature) * 0x10001u;          // 1024 + z
    high = (0xd400u + feature_8 * 16) * 0x10001u;  // -64 - z, for z up to 16
  }
};

template <>
struct ZeroPair<__nv_bfloat16, 4> {
  uint32_t low, high;
  __device__ __forceinline__ void set(uint32_t feature, uint32_t feature_8) {
    low = (0x4300u + feature) * 0x10001u;  // 128 + z
    high = (0x4300u + feature_8) * 0x10001u;
  }
};

template <>
struct ZeroPair<__half, 8> {
  uint32_t low, high;
  __device__ __forceinline__ void set(uint32_t feature, uint32_t feature_8) {
    low = (0x6400u + feature) * 0x10001u;
    high = (0x6400u + feature_8) * 0x10001u;
  }
};

template <>
struct ZeroPair<__nv_bfloat16, 8> {
  float low, high;
  __device__ __forceinline__ void set(uint32_t feature, uint32_t feature_8) {
    low = 8388608.0f + static_cast<float>(feature);  // 2^23 + z
    high = 8388608.0f + static_cast<float>(feature_8);
  }
};

__device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b, __half) {
  uint32_t result;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

__device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b, __nv_bfloat16) {
  // a * 1 - b, for chips without a bf16 subtraction.
  uint32_t result;
  constexpr uint32_t kOnes = 0x3f803f80u;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(kOnes), "r"(b ^ 0x80008000u));
  return result;
}

/// The fragment of 16 rows from the words of one lane: 4 bits take one word, 8 bits two.
__device__ __forceinline__ void decode(uint32_t (&a)[4], const uint32_t* words,
                                       const ZeroPair<__half, 4>& zero, __half) {
  constexpr uint32_t kBase = 0x64006400u;
  constexpr uint32_t kSixteenth = 0x2c002c00u;
  const uint32_t word = words[0];
  const uint32_t upper = word >> 8;
  a[0] = subtract(and_or(word, 0x000f000fu, kBase), zero.low, __half());
  a[2] = subtract(and_or(upper, 0x000f000fu, kBase), zero.low, __half());
  const uint32_t b1 = and_or(word, 0x00f000f0u, kBase);
  const uint32_t b3 = and_or(upper, 0x00f000f0u, kBase);
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(a[1]) : "r"(b1), "r"(kSixteenth), "r"(zero.high));
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(a[3]) : "r"(b3), "r"(kSixteenth), "r"(zero.high));
}

__device__ __forceinline__ void decode(uint32_t (&a)[4], const uint32_t* words,
                                       const ZeroPair<__nv_bfloat16, 4>& zero, __nv_bfloat16) {
  constexpr uint32_t kBase = 0x43004300u;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    a[r] = subtract(and_or(words[0] >> (4 * r), 0x000f000fu, kBase), (r & 1) ? zero.high : zero.low,
                    __nv_bfloat16());
  }
}

__device__ __forceinline__ void decode(uint32_t (&a)[4], const uint32_t* words,
                                       const ZeroPair<__half, 8>& zero, __half) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    a[2 * h] = subtract(__byte_perm(words[h], 0x64646464u, 0x4140), zero.low, __half());
    a[2 * h + 1] = subtract(__byte_perm(words[h], 0x64646464u, 0x4342), zero.high, __half());
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
  __device__ __forceinline__ void set(uint32_t feature, uint32_t feature_8) {
    low = static_cast<float>(feature);
    high = static_cast<float>(feature_8);
  }
};

/// Codes are multiplied as q - z.
struct NoOffsetCodes {
  static constexpr bool kHas = false;
};

/// What all float16 codes have in common.
struct SubnormalCodes {
  static constexpr bool kHas = true;
  static constexpr uint32_t kOnes = 0x3c003c00u;  // a pair of 1
  static constexpr float kOffset = 0.0f;
  static constexpr float kUnit = 0x1p24f;
};

/// Codes of 16 rows as (kOffset + q) / kUnit, or those of the feature 8 above over kUpperUnit. Products with x, by the
/// unit, are (kOffset + z) Σ x too large.
template <class T, int kBits>
struct OffsetCodes : NoOffsetCodes {};

template <>
struct OffsetCodes<__half, 4> : SubnormalCodes {
  static constexpr float kUpperUnit = 0x1p20f;
  __device__ __forceinline__ static void decode(uint32_t (&a)[4], const uint32_t* words) {
    const uint32_t upper = words[0] >> 8;
    a[0] = words[0] & 0x000f000fu;
    a[1] = words[0] & 0x00f000f0u;
    a[2] = upper & 0x000f000fu;
    a[3] = upper & 0x00f000f0u;
  }
};

template <>
struct OffsetCodes<__half, 8> : SubnormalCodes {
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
  static constexpr uint32_t kOnes = 0x3f803f80u;
  static constexpr float kOffset = 128.0f;
  static constexpr float kUnit = 1.0f;
  static constexpr float kUpperUnit = 1.0f;
  __device__ __forceinline__ static void decode(uint32_t (&a)[4], const uint32_t* words) {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = and_or(words[0] >> (4 * r), 0x000f000fu, 0x43004300u);
  }
};

}  // namespace marlinq::cuda
