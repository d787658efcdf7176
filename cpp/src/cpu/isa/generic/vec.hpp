// Four-lane vectors of the compiler: SSE2, NEON or plain scalars, whatever the target's baseline
// has.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/half.hpp"

namespace marlinq::cpu::MARLINQ_CPU_ISA {

struct Vec {
  static constexpr int kLanes = 4;
  // 2 rows x 4 vectors: 8 accumulators, 4 weights and a broadcast in 16 registers.
  static constexpr int kVectors = 4;
  static constexpr int kTileRows = 2;
  static constexpr int kRunsOfOneRow = 2;

  typedef float F __attribute__((vector_size(16)));
  typedef std::uint32_t I __attribute__((vector_size(16)));
  typedef std::int32_t Signed __attribute__((vector_size(16)));

  [[gnu::always_inline]] static inline F zero() { return F{0, 0, 0, 0}; }
  [[gnu::always_inline]] static inline F broadcast(float value) {
    return F{value, value, value, value};
  }
  [[gnu::always_inline]] static inline F load(const float* p) { return load_unaligned(p); }
  [[gnu::always_inline]] static inline void store(float* p, F value) { store_unaligned(p, value); }
  [[gnu::always_inline]] static inline F load_unaligned(const void* p) {
    F value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
  [[gnu::always_inline]] static inline void store_unaligned(void* p, F value) {
    std::memcpy(p, &value, sizeof value);
  }
  [[gnu::always_inline]] static inline I load_words(const std::uint8_t* p) {
    I value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
  [[gnu::always_inline]] static inline F multiply_add(F a, F b, F c) { return a * b + c; }
  [[gnu::always_inline]] static inline F negative_multiply_add(F a, F b, F c) { return c - a * b; }

  [[gnu::always_inline]] static inline F load_float16(const std::uint8_t* p) {
    std::uint16_t h[kLanes];
    std::memcpy(h, p, sizeof h);
    return F{float16_to_float(h[0]), float16_to_float(h[1]), float16_to_float(h[2]),
             float16_to_float(h[3])};
  }
  [[gnu::always_inline]] static inline void store_float16(std::uint8_t* p, F value) {
    const std::uint16_t h[kLanes] = {float_to_float16(value[0]), float_to_float16(value[1]),
                                     float_to_float16(value[2]), float_to_float16(value[3])};
    std::memcpy(p, h, sizeof h);
  }
  [[gnu::always_inline]] static inline F load_bfloat16(const std::uint8_t* p) {
    std::uint16_t h[kLanes];
    std::memcpy(h, p, sizeof h);
    return F{bfloat16_to_float(h[0]), bfloat16_to_float(h[1]), bfloat16_to_float(h[2]),
             bfloat16_to_float(h[3])};
  }
  [[gnu::always_inline]] static inline F load_zero_bytes(const std::uint8_t* p,
                                                         std::int32_t middle) {
    const Signed wide = {p[0], p[1], p[2], p[3]};
    return __builtin_convertvector(wide - middle, F);
  }

  [[gnu::always_inline]] static inline F load_zero_nibbles(const std::uint8_t* p,
                                                           std::int32_t middle) {
    const Signed wide = {p[0] & 15, p[0] >> 4, p[1] & 15, p[1] >> 4};
    return __builtin_convertvector(wide - middle, F);
  }

  struct Decoder {
    Signed middle;
    [[gnu::always_inline]] explicit inline Decoder(std::int32_t value)
        : middle{value, value, value, value} {}

    /// float(code - middle) of the kBits bits of each word from bit kBit.
    template <int kBits, int kBit>
    [[gnu::always_inline]] inline F decode(I words) const {
      constexpr std::uint32_t kMask = (1U << kBits) - 1U;
      const I codes = (words >> static_cast<std::uint32_t>(kBit)) & kMask;
      return __builtin_convertvector(reinterpret_cast<Signed>(codes) - middle, F);
    }
  };
};

}  // namespace marlinq::cpu::MARLINQ_CPU_ISA
