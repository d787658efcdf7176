// The kernels of one instruction set; isa.cmake has its compiler flags.
#define MARLINQ_CPU_ISA generic

#include "cpu/isa/generic/vec.hpp"
//
#include "cpu/generic/gemm-inl.hpp"

namespace marlinq::cpu::generic {

extern const IsaKernels kKernels;
constinit const IsaKernels kKernels = {
    .name = "generic",
    .priority = 0,
    .required = 0,
    .tile_rows = Vec::kTileRows,
    .gemm_float32 = gemm_float32,
    .to_float = to_float,
    .from_float = from_float,
};

}  // namespace marlinq::cpu::generic
