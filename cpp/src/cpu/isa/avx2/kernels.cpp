// The kernels of one instruction set; isa.cmake has its compiler flags.
#define MARLINQ_CPU_ISA avx2

#include "cpu/isa/avx2/vec.hpp"

namespace marlinq::cpu::avx2 {

struct Vec : Vec256 {
  // 6 sums of one vector, or 4 of two, in 16 and in 32 bits each; 2 codes, a broadcast and a mask.
  static constexpr int kIntegerSums = 4;
  static constexpr int kInt16Rows = 3;
  static constexpr int kInt8Rows = 6;
  static constexpr int kChainedSums = 0;  // additions of 16 bits have no latency to hide

  // Rows whose products with 4-bit codes add up in 16 bits: a pair is at most 2 * 15 * 128, and eight
  // pairs are 30720.
  static constexpr int kNarrowRows = 32;

  // As float32's tiles: 12 sums, 2 codes, a broadcast and a product.
  static constexpr int kPairRows = 6;
  static constexpr int kMostFewRows = 3;

  /// sum += the two products of 16-bit codes and x in each word. In the order of the source: left to itself, GCC 12
  /// begins with all products and moves sums to the stack.
  [[gnu::always_inline]] static inline void dot_pairs(I& sum, I codes, I x) {
    I products;
    __asm__ volatile("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
                     : "+x"(sum), "=&x"(products)
                     : "x"(codes), "x"(x));
  }
  /// sum += the products of unsigned bytes of 4-bit codes with signed bytes of x, in pairs, in 16 bits.
  [[gnu::always_inline]] static inline void dot_narrow(I& sum, I codes, I x) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x));
  }
  /// Two such sums a word.
  [[gnu::always_inline]] static inline I widen(I sum) {
    return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
  }
  /// sum += the four products of unsigned bytes of 8-bit codes with signed bytes of x, in each word.
  /// Codes are taken apart, since a pair of their products would not fit into 16 bits.
  template <int kBits>
    requires(kBits == 8)
  [[gnu::always_inline]] static inline void dot(I& sum, I codes, I x) {
    const I low = _mm256_maddubs_epi16(low_nibbles(codes), x);
    const I high = _mm256_maddubs_epi16(high_nibbles(codes), x);
    sum = add_words(sum, widen(low));
    sum = add_words(sum, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
  }
};

}  // namespace marlinq::cpu::avx2
//
#include "cpu/generic/integer_gemm-inl.hpp"
#include "cpu/generic/kernels-inl.hpp"
#include "cpu/generic/pairs_gemm-inl.hpp"

namespace marlinq::cpu::avx2 {

extern const IsaKernels kKernels;
constinit const IsaKernels kKernels = with_pairs(with_floats({
    .name = "avx2",
    .priority = 20,
    .required = kAvx2 | kFma | kF16c,
    .int16_by_default = false,
}));

}  // namespace marlinq::cpu::avx2
