// Sixteen-lane vectors: AVX-512 F, BW, DQ, VL.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace marlinq::cpu::MARLINQ_CPU_ISA {

struct Vec {
  static constexpr int kLanes = 16;
  // 8 rows x 2 vectors: 16 accumulators of 32 registers, enough chains to hide the latency of FMA
  // twice.
  static constexpr int kVectors = 2;
  static constexpr int kTileRows = 8;

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

}  // namespace marlinq::cpu::MARLINQ_CPU_ISA
