// Sixteen-lane vectors: AVX-512 F, BW, DQ, VL, VNNI, BF16.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace marlinq::cpu::MARLINQ_CPU_ISA {

struct Vec {
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 32;
  // 10 rows x 2 vectors: 20 accumulators of 32 registers; with 12 rows GCC moves some to the stack.
  static constexpr int kVectors = 2;
  static constexpr int kTileRows = 10;
  // Chains of 2 vectors each for one row: eight, as latency and rate of FMA ask for.
  static constexpr int kRunsOfOneRow = 4;

  // 3 rows x 2 vectors x 2 halves, or 6 rows x 2 vectors: 12 accumulators, up to 12 results, 4 codes, a
  // broadcast and a mask. Twice as many accumulators are no quicker, and leave the results in memory,
  // which short groups feel.
  static constexpr int kIntegerSums = 12;
  static constexpr int kInt16Rows = 3;
  static constexpr int kInt8Rows = 6;
  // Up to so many sums a vector of columns have two chains each: 16 accumulators.
  static constexpr int kChainedSums = 4;

  using F = __m512;
  using I = __m512i;

  [[gnu::always_inline]] static inline F zero() { return _mm512_setzero_ps(); }
  [[gnu::always_inline]] static inline F broadcast(float value) { return _mm512_set1_ps(value); }
  [[gnu::always_inline]] static inline F load(const float* p) { return _mm512_load_ps(p); }
  [[gnu::always_inline]] static inline void store(float* p, F value) { _mm512_store_ps(p, value); }
  [[gnu::always_inline]] static inline F load_unaligned(const void* p) {
    return _mm512_loadu_ps(p);
  }
  [[gnu::always_inline]] static inline void store_unaligned(void* p, F value) {
    _mm512_storeu_ps(p, value);
  }
  [[gnu::always_inline]] static inline I load_words(const std::uint8_t* p) {
    return _mm512_loadu_si512(p);
  }
  [[gnu::always_inline]] static inline F multiply_add(F a, F b, F c) {
    return _mm512_fmadd_ps(a, b, c);
  }
  [[gnu::always_inline]] static inline F negative_multiply_add(F a, F b, F c) {
    return _mm512_fnmadd_ps(a, b, c);
  }

  [[gnu::always_inline]] static inline F load_float16(const std::uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  [[gnu::always_inline]] static inline void store_float16(std::uint8_t* p, F value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  [[gnu::always_inline]] static inline F load_bfloat16(const std::uint8_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  [[gnu::always_inline]] static inline F load_zero_bytes(const std::uint8_t* p,
                                                         std::int32_t middle) {
    const I wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(wide, _mm512_set1_epi32(middle)));
  }

  [[gnu::always_inline]] static inline F load_zero_nibbles(const std::uint8_t* p,
                                                           std::int32_t middle) {
    const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i mask = _mm_set1_epi8(15);
    const __m128i low = _mm_and_si128(pairs, mask);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(pairs, 4), mask);
    const I wide = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(wide, _mm512_set1_epi32(middle)));
  }

  [[gnu::always_inline]] static inline F multiply(F a, F b) { return _mm512_mul_ps(a, b); }

  [[gnu::always_inline]] static inline I zero_words() { return _mm512_setzero_si512(); }
  [[gnu::always_inline]] static inline I broadcast_word(const void* p) {
    std::int32_t word;
    __builtin_memcpy(&word, p, sizeof word);
    return _mm512_set1_epi32(word);
  }
  [[gnu::always_inline]] static inline I add_words(I a, I b) { return _mm512_add_epi32(a, b); }
  [[gnu::always_inline]] static inline I shift_left_8(I a) { return _mm512_slli_epi32(a, 8); }
  [[gnu::always_inline]] static inline I shift_right_4(I a) { return _mm512_srai_epi32(a, 4); }
  [[gnu::always_inline]] static inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  [[gnu::always_inline]] static inline I low_nibbles(I words) {
    return _mm512_and_si512(words, _mm512_set1_epi32(0x0F0F0F0F));
  }
  /// 16 times the high nibbles.
  [[gnu::always_inline]] static inline I high_nibbles_in_place(I words) {
    return _mm512_andnot_si512(_mm512_set1_epi32(0x0F0F0F0F), words);
  }
  [[gnu::always_inline]] static inline I high_nibbles(I words) {
    return low_nibbles(_mm512_srli_epi32(words, 4));
  }
  /// GCC would load a value again for each of its uses.
  [[gnu::always_inline]] static inline void keep_in_register(I& value) {
    __asm__("" : "+v"(value));
  }
  /// sum += the four products of unsigned bytes of `codes` with signed bytes of `x`, in each word.
  /// Not the intrinsic, whose accumulators GCC 12 moves to the stack.
  template <int kBits>
  [[gnu::always_inline]] static inline void dot(I& sum, I codes, I x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
  }
  /// sum += the two products of bfloat16 in each word.
  [[gnu::always_inline]] static inline void dot_bfloat16(F& sum, I weights, F x) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
  }

  struct Decoder {
    F middle;
    F table;  // code - middle of the 16 four-bit codes
    [[gnu::always_inline]] explicit inline Decoder(std::int32_t value)
        : middle(_mm512_set1_ps(static_cast<float>(value))) {
      const I codes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
      table = _mm512_sub_ps(_mm512_cvtepi32_ps(codes), middle);
    }

    /// float(code - middle) of the kBits bits of each word from bit kBit.
    template <int kBits, int kBit>
    [[gnu::always_inline]] inline F decode(I words) const {
      if constexpr (kBits == 4) {  // the look-up takes its index from the low 4 bits of each word
        return _mm512_permutexvar_ps(_mm512_srli_epi32(words, kBit), table);
      } else {
        const I codes =
            _mm512_and_si512(_mm512_srli_epi32(words, kBit), _mm512_set1_epi32((1 << kBits) - 1));
        return _mm512_sub_ps(_mm512_cvtepi32_ps(codes), middle);
      }
    }
  };
};

/// Pairs of bfloat16 (generic/float_gemm-inl.hpp). Pair i of a dword of codes has the rows whose
/// codes lie in bits [b, b + bits) and [b + 16, b + 16 + bits), b = i * bits.
struct Bfloat16Unit {
  static constexpr int kRowsPerDword = 2;
  static constexpr int kTileRows = 12;  // 24 accumulators

  __m512i table;  // code - middle of the 16 four-bit codes as bfloat16, twice
  __m512 middle;
  [[gnu::always_inline]] explicit inline Bfloat16Unit(std::int32_t value)
      : middle(_mm512_set1_ps(static_cast<float>(value))) {
    const __m512i codes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 exact = _mm512_sub_ps(_mm512_cvtepi32_ps(codes), middle);
    const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(exact), 16));
    table = _mm512_broadcast_i64x4(half);
  }

  template <int kBits, int kPair>
  [[gnu::always_inline]] inline __m512 decode(__m512i words) const {
    if constexpr (kBits == 4) {  // the look-up takes its index from the low 5 bits of each half
      return _mm512_castsi512_ps(
          _mm512_permutexvar_epi16(_mm512_srli_epi32(words, 4 * kPair), table));
    } else {
      const __m512i mask = _mm512_set1_epi32(0xFF);
      const __m512i low = _mm512_and_si512(_mm512_srli_epi32(words, 8 * kPair), mask);
      const __m512i high = _mm512_and_si512(_mm512_srli_epi32(words, 8 * kPair + 16), mask);
      const __m512i first = _mm512_castps_si512(_mm512_sub_ps(_mm512_cvtepi32_ps(low), middle));
      const __m512i second = _mm512_castps_si512(_mm512_sub_ps(_mm512_cvtepi32_ps(high), middle));
      return _mm512_castsi512_ps(
          _mm512_mask_blend_epi16(0xAAAAAAAAU, _mm512_srli_epi32(first, 16), second));
    }
  }
  [[gnu::always_inline]] static inline void multiply_add(__m512& sum, __m512 x, __m512 weights) {
    Vec::dot_bfloat16(sum, _mm512_castps_si512(weights), x);
  }
};

}  // namespace marlinq::cpu::MARLINQ_CPU_ISA
