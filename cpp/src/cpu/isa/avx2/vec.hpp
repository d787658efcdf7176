// Eight-lane vectors: AVX2, FMA, F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace marlinq::cpu::MARLINQ_CPU_ISA {

struct Vec256 {
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 16;
  // 6 rows x 2 vectors: 12 accumulators, 2 weights and a broadcast in 16 registers.
  static constexpr int kVectors = 2;
  static constexpr int kTileRows = 6;
  static constexpr int kRunsOfOneRow = 2;

  using F = __m256;
  using I = __m256i;

  [[gnu::always_inline]] static inline F zero() { return _mm256_setzero_ps(); }
  [[gnu::always_inline]] static inline F broadcast(float value) { return _mm256_set1_ps(value); }
  [[gnu::always_inline]] static inline F load(const float* p) { return _mm256_load_ps(p); }
  [[gnu::always_inline]] static inline void store(float* p, F value) { _mm256_store_ps(p, value); }
  [[gnu::always_inline]] static inline F load_unaligned(const void* p) {
    return _mm256_loadu_ps(static_cast<const float*>(p));
  }
  [[gnu::always_inline]] static inline void store_unaligned(void* p, F value) {
    _mm256_storeu_ps(static_cast<float*>(p), value);
  }
  [[gnu::always_inline]] static inline I load_words(const std::uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const I*>(p));
  }
  [[gnu::always_inline]] static inline F multiply_add(F a, F b, F c) {
    return _mm256_fmadd_ps(a, b, c);
  }
  [[gnu::always_inline]] static inline F negative_multiply_add(F a, F b, F c) {
    return _mm256_fnmadd_ps(a, b, c);
  }

  [[gnu::always_inline]] static inline F load_float16(const std::uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  [[gnu::always_inline]] static inline void store_float16(std::uint8_t* p, F value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  [[gnu::always_inline]] static inline F load_bfloat16(const std::uint8_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  [[gnu::always_inline]] static inline F load_zero_bytes(const std::uint8_t* p,
                                                         std::int32_t middle) {
    const I wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(wide, _mm256_set1_epi32(middle)));
  }

  [[gnu::always_inline]] static inline F load_zero_nibbles(const std::uint8_t* p,
                                                           std::int32_t middle) {
    std::int32_t packed;
    std::memcpy(&packed, p, sizeof packed);
    const __m128i pairs = _mm_cvtsi32_si128(packed);
    const __m128i mask = _mm_set1_epi8(15);
    const __m128i low = _mm_and_si128(pairs, mask);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(pairs, 4), mask);
    const I wide = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(low, high));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(wide, _mm256_set1_epi32(middle)));
  }

  [[gnu::always_inline]] static inline F multiply(F a, F b) { return _mm256_mul_ps(a, b); }

  [[gnu::always_inline]] static inline I zero_words() { return _mm256_setzero_si256(); }
  [[gnu::always_inline]] static inline I broadcast_word(const void* p) {
    std::int32_t word;
    std::memcpy(&word, p, sizeof word);
    return _mm256_set1_epi32(word);
  }
  [[gnu::always_inline]] static inline I add_words(I a, I b) { return _mm256_add_epi32(a, b); }
  [[gnu::always_inline]] static inline I shift_left_8(I a) { return _mm256_slli_epi32(a, 8); }
  /// GCC would load a value again for each of its uses.
  [[gnu::always_inline]] static inline void keep_in_register(I& value) {
    __asm__("" : "+x"(value));
  }
  [[gnu::always_inline]] static inline I shift_right_4(I a) { return _mm256_srai_epi32(a, 4); }
  [[gnu::always_inline]] static inline F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  [[gnu::always_inline]] static inline I low_nibbles(I words) {
    return _mm256_and_si256(words, _mm256_set1_epi32(0x0F0F0F0F));
  }
  /// 16 times the high nibbles.
  [[gnu::always_inline]] static inline I high_nibbles_in_place(I words) {
    return _mm256_andnot_si256(_mm256_set1_epi32(0x0F0F0F0F), words);
  }
  [[gnu::always_inline]] static inline I high_nibbles(I words) {
    return low_nibbles(_mm256_srli_epi32(words, 4));
  }

  [[gnu::always_inline]] static inline void store_words(std::uint32_t* p, I value) {
    _mm256_store_si256(reinterpret_cast<I*>(p), value);
  }
  /// The codes of a word's pair kPair, as two numbers of 16 bits.
  template <int kBits, int kPair>
  [[gnu::always_inline]] static inline I pair_of_codes(I words) {
    const I mask = _mm256_set1_epi32(kBits == 4 ? 0x000F000F : 0x00FF00FF);
    return _mm256_and_si256(_mm256_srli_epi32(words, kBits * kPair), mask);
  }

  struct Decoder {
    F middle;
    [[gnu::always_inline]] explicit inline Decoder(std::int32_t value)
        : middle(_mm256_set1_ps(static_cast<float>(value))) {}

    /// float(code - middle) of the kBits bits of each word from bit kBit.
    template <int kBits, int kBit>
    [[gnu::always_inline]] inline F decode(I words) const {
      const I codes =
          _mm256_and_si256(_mm256_srli_epi32(words, kBit), _mm256_set1_epi32((1 << kBits) - 1));
      return _mm256_sub_ps(_mm256_cvtepi32_ps(codes), middle);
    }
  };
};

}  // namespace marlinq::cpu::MARLINQ_CPU_ISA
