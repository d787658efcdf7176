// The kernels of AVX-512 for processors with VNNI and without BF16; isa.cmake has the compiler flags.
#define MARLINQ_CPU_ISA avx512_vnni

#include "cpu/isa/avx512/vec.hpp"
//
#include "cpu/generic/integer_gemm-inl.hpp"
#include "cpu/generic/kernels-inl.hpp"

namespace marlinq::cpu::avx512_vnni {

extern const IsaKernels kKernels;
constinit const IsaKernels kKernels = with_integers(with_floats({
    .name = "avx512_vnni",
    .priority = 35,
    .required = kAvx2 | kFma | kF16c | kAvx512 | kAvx512Vnni,
    .int16_by_default = true,
}));

}  // namespace marlinq::cpu::avx512_vnni
