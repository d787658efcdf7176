// The kernels of one instruction set; isa.cmake has its compiler flags.
#define MARLINQ_CPU_ISA avx2

#include "cpu/isa/avx2/vec.hpp"
//
#include "cpu/generic/gemm-inl.hpp"

namespace marlinq::cpu::avx2 {

extern const IsaKernels kKernels;
constinit const IsaKernels kKernels = {
    .name = "avx2",
    .priority = 20,
    .required = kAvx2 | kFma | kF16c,
    .tile_rows = Vec::kTileRows,
    .gemm_float32 = gemm_float32,
    .to_float = to_float,
    .from_float = from_float,
};

}  // namespace marlinq::cpu::avx2
