// What an instruction set with vectors of floats fills of its table; integer_gemm-inl.hpp has the rest.
#pragma once

#include "cpu/generic/convert-inl.hpp"
#include "cpu/generic/float_gemm-inl.hpp"
#include "cpu/generic/prepare-inl.hpp"
#include "cpu/generic/sigmoid-inl.hpp"

namespace marlinq::cpu::MARLINQ_CPU_ISA {
namespace {

// Every compute type through float32's product.
constexpr IsaKernels with_floats(IsaKernels entry) {
  entry.float32 = float32_arithmetic(prepare_float32, true);
  entry.int16 = float32_arithmetic(prepare_integers_as_floats<2>, false);
  entry.bfloat16 = float32_arithmetic(prepare_bfloat16<false>, false);
  entry.int8 = float32_arithmetic(prepare_integers_as_floats<1>, false);
  entry.to_float = to_float;
  entry.from_float = from_float;
  entry.sigmoid = sigmoid;
  return entry;
}

}  // namespace
}  // namespace marlinq::cpu::MARLINQ_CPU_ISA
