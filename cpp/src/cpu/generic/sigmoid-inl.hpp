// 1 / (1 + exp(-x)), element by element, in a loop that the compiler makes vectors of; everything
// has internal linkage.
#pragma once

#include <cstdint>
#include <cstring>

namespace marlinq::cpu::MARLINQ_CPU_ISA {
namespace {

/// Within 3e-7 of the value; NaN stays NaN.
void sigmoid(const float* x, float* y, std::int64_t count) {
  // exp(z) = 2^n exp(r) with |r| at most ln(2) / 2, where terms up to r^7 / 7! leave 5e-9.
  constexpr float kLog2E = 1.44269504F;
  constexpr float kLn2High = 0.693359375F;  // few bits, so that n times it is exact
  constexpr float kLn2Low = -2.12194440e-4F;
  constexpr float kRound = 0x1.8p23F;  // adding it leaves the nearest integer in the low bits
  constexpr float kMost = 87.0F;       // exp of it, and of minus it, is a normal number
  for (std::int64_t i = 0; i < count; ++i) {
    float z = -x[i];
    z = z > kMost ? kMost : z;
    z = z < -kMost ? -kMost : z;
    const float shifted = z * kLog2E + kRound;
    const float n = shifted - kRound;
    const float r = (z - n * kLn2High) - n * kLn2Low;
    float sum = 1.0F / 5040.0F;
    sum = sum * r + 1.0F / 720.0F;
    sum = sum * r + 1.0F / 120.0F;
    sum = sum * r + 1.0F / 24.0F;
    sum = sum * r + 1.0F / 6.0F;
    sum = sum * r + 0.5F;
    sum = sum * r + 1.0F;
    sum = sum * r + 1.0F;
    std::uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127U) << 23;  // what is left of the constant is shifted out
    float power;
    std::memcpy(&power, &bits, sizeof power);
    y[i] = 1.0F / (1.0F + power * sum);
  }
}

}  // namespace
}  // namespace marlinq::cpu::MARLINQ_CPU_ISA
