// The kernels of AVX-512 for processors with VNNI and without BF16; isa.cmake has the compiler flags.
#define MARLINQ_CPU_ISA avx512_vnni

#include "cpu/isa/avx512/vec.hpp"
//
#include "cpu/generic/convert-inl.hpp"
#include "cpu/generic/float_gemm-inl.hpp"
#include "cpu/generic/integer_gemm-inl.hpp"
#include "cpu/generic/prepare-inl.hpp"
#include "cpu/generic/sigmoid-inl.hpp"

namespace marlinq::cpu::avx512_vnni {

extern const IsaKernels kKernels;
constinit const IsaKernels kKernels = {
    .name = "avx512_vnni",
    .priority = 35,
    .required = kAvx2 | kFma | kF16c | kAvx512 | kAvx512Vnni,
    .int16_by_default = true,
    .float32 = float32_arithmetic(prepare_float32, true),
    .int16 = integer_arithmetic<2>(),
    .bfloat16 = float32_arithmetic(prepare_bfloat16<false>, false),
    .int8 = integer_arithmetic<1>(),
    .to_float = to_float,
    .from_float = from_float,
    .sigmoid = sigmoid,
};

}  // namespace marlinq::cpu::avx512_vnni
