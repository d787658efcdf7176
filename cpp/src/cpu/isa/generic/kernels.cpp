// The kernels of one instruction set; isa.cmake has its compiler flags.
#define MARLINQ_CPU_ISA generic

#include "cpu/isa/generic/vec.hpp"
//
#include "cpu/generic/convert-inl.hpp"
#include "cpu/generic/float_gemm-inl.hpp"
#include "cpu/generic/prepare-inl.hpp"
#include "cpu/generic/sigmoid-inl.hpp"

namespace marlinq::cpu::generic {

extern const IsaKernels kKernels;
constinit const IsaKernels kKernels = {
    .name = "generic",
    .priority = 0,
    .required = 0,
    .int16_by_default = false,
    .float32 = float32_arithmetic(prepare_float32, true),
    .int16 = float32_arithmetic(prepare_integers_as_floats<2>, false),
    .bfloat16 = float32_arithmetic(prepare_bfloat16<false>, false),
    .int8 = float32_arithmetic(prepare_integers_as_floats<1>, false),
    .to_float = to_float,
    .from_float = from_float,
    .sigmoid = sigmoid,
};

}  // namespace marlinq::cpu::generic
