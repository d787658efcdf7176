// The kernels of one instruction set; isa.cmake has its compiler flags.
#define MARLINQ_CPU_ISA avx512

#include "cpu/isa/avx512/vec.hpp"
//
#include "cpu/generic/convert-inl.hpp"
#include "cpu/generic/float_gemm-inl.hpp"
#include "cpu/generic/integer_gemm-inl.hpp"
#include "cpu/generic/prepare-inl.hpp"
#include "cpu/generic/sigmoid-inl.hpp"

namespace marlinq::cpu::avx512 {

extern const IsaKernels kKernels;
constinit const IsaKernels kKernels = {
    .name = "avx512",
    .priority = 40,
    .required = kAvx2 | kFma | kF16c | kAvx512 | kAvx512Vnni | kAvx512Bf16,
    .int16_by_default = true,
    .float32 = float32_arithmetic(prepare_float32, true),
    .int16 = integer_arithmetic<2>(),
    .bfloat16 = {.native = true,
                 .integer = false,
                 .tile_rows = Bfloat16Unit::kTileRows,
                 .element_bytes = 2,
                 .prepare = prepare_bfloat16<true>,
                 .gemm = gemm_floats<Bfloat16Unit>,
                 .saturate = saturate_floats<Bfloat16Unit>},
    .int8 = integer_arithmetic<1>(),
    .to_float = to_float,
    .from_float = from_float,
    .sigmoid = sigmoid,
};

}  // namespace marlinq::cpu::avx512
