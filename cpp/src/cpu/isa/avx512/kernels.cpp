// The kernels of one instruction set; isa.cmake has its compiler flags.
#define MARLINQ_CPU_ISA avx512

#include "cpu/isa/avx512/vec.hpp"
//
#include "cpu/generic/integer_gemm-inl.hpp"
#include "cpu/generic/kernels-inl.hpp"

namespace marlinq::cpu::avx512 {

namespace {

constexpr IsaKernels with_bfloat16(IsaKernels entry) {
  entry.bfloat16 = {.native = true,
                    .integer = false,
                    .tile_rows = Bfloat16Unit::kTileRows,
                    .element_bytes = 2,
                    .prepare = prepare_bfloat16<true>,
                    .gemm = gemm_floats<Bfloat16Unit>,
                    .saturate = saturate_floats<Bfloat16Unit>};
  return entry;
}

}  // namespace

extern const IsaKernels kKernels;
constinit const IsaKernels kKernels = with_bfloat16(with_integers(with_floats({
    .name = "avx512",
    .priority = 40,
    .required = kAvx2 | kFma | kF16c | kAvx512 | kAvx512Vnni | kAvx512Bf16,
    .int16_by_default = true,
})));

}  // namespace marlinq::cpu::avx512
