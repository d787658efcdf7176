// The kernels of one instruction set; isa.cmake has its compiler flags.
#define MARLINQ_CPU_ISA avx512

#include "cpu/isa/avx512/vec.hpp"
//
#include "cpu/generic/gemm-inl.hpp"

namespace marlinq::cpu::avx512 {

extern const IsaKernels kKernels;
constinit const IsaKernels kKernels = {
    .name = "avx512",
    .priority = 40,
    .required = kAvx2 | kFma | kF16c | kAvx512 | kAvx512Vnni | kAvx512Bf16,
    .tile_rows = Vec::kTileRows,
    .gemm_float32 = gemm_float32,
    .to_float = to_float,
    .from_float = from_float,
};

}  // namespace marlinq::cpu::avx512
