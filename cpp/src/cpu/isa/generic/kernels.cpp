// The kernels of one instruction set; isa.cmake has its compiler flags.
#define MARLINQ_CPU_ISA generic

#include "cpu/isa/generic/vec.hpp"
//
#include "cpu/generic/kernels-inl.hpp"

namespace marlinq::cpu::generic {

extern const IsaKernels kKernels;
constinit const IsaKernels kKernels = with_floats({
    .name = "generic",
    .priority = 0,
    .required = 0,
    .int16_by_default = false,
});

}  // namespace marlinq::cpu::generic
