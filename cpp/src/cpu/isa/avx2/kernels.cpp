// The kernels of one instruction set; isa.cmake has its compiler flags.
#define MARLINQ_CPU_ISA avx2

#include "cpu/isa/avx2/vec.hpp"

namespace marlinq::cpu::avx2 {
using Vec = Vec256;
}
//
#include "cpu/generic/convert-inl.hpp"
#include "cpu/generic/float_gemm-inl.hpp"
#include "cpu/generic/prepare-inl.hpp"
#include "cpu/generic/sigmoid-inl.hpp"

namespace marlinq::cpu::avx2 {

extern const IsaKernels kKernels;
constinit const IsaKernels kKernels = {
    .name = "avx2",
    .priority = 20,
    .required = kAvx2 | kFma | kF16c,
    .float32 = float32_arithmetic(prepare_float32, true),
    .int16 = float32_arithmetic(prepare_integers_as_floats<2>, false),
    .bfloat16 = float32_arithmetic(prepare_bfloat16<false>, false),
    .int8 = float32_arithmetic(prepare_integers_as_floats<1>, false),
    .to_float = to_float,
    .from_float = from_float,
    .sigmoid = sigmoid,
};

}  // namespace marlinq::cpu::avx2
