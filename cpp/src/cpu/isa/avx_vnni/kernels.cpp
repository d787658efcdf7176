// The kernels of one instruction set; isa.cmake has its compiler flags.
#define MARLINQ_CPU_ISA avx_vnni

#include "cpu/isa/avx2/vec.hpp"

namespace marlinq::cpu::avx_vnni {

struct Vec : Vec256 {
  // 2 rows x 2 vectors x 2 halves, or 5 rows x 2 vectors: 8 or 10 accumulators, 4 codes, a broadcast
  // and a mask.
  static constexpr int kIntegerSums = 10;
  static constexpr int kInt16Rows = 2;
  static constexpr int kInt8Rows = 5;
  // Up to so many sums a vector of columns have two chains each: 8 accumulators.
  static constexpr int kChainedSums = 2;

  /// sum += the four products of unsigned bytes of `codes` with signed bytes of `x`, in each word.
  /// Not the intrinsic, whose accumulators GCC 12 moves to the stack.
  template <int kBits>
  [[gnu::always_inline]] static inline void dot(I& sum, I codes, I x) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(x));
  }
};

}  // namespace marlinq::cpu::avx_vnni
//
#include "cpu/generic/integer_gemm-inl.hpp"
#include "cpu/generic/kernels-inl.hpp"

namespace marlinq::cpu::avx_vnni {

extern const IsaKernels kKernels;
constinit const IsaKernels kKernels = with_integers(with_floats({
    .name = "avx_vnni",
    .priority = 30,
    .required = kAvx2 | kFma | kF16c | kAvxVnni,
    .int16_by_default = true,
}));

}  // namespace marlinq::cpu::avx_vnni
