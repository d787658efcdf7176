// Short groups of float16: codes multiplied by their scales.
//
// Sums in units of a group's scale have to be multiplied where a group ends, by each thread and after all its products:
// where a slab has several groups that takes as long as products. A fragment has few registers, which can be multiplied
// instead, at the price of a rounding of each weight to float16. bfloat16 has too few bits for that.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/device/dequantize.cuh"
#include "cuda/ptx/copy.cuh"

namespace marlinq::cuda::sm90 {

/// Whether tiles multiply codes by scales where a slab has several groups; `scales_codes` of tile_plan.hpp on the host.
template <class T>
constexpr bool kScalesCodes = std::is_same_v<T, __half>;

/// Scales of one group for the two features of a lane, g and g + 8.
template <int kBits>
class CodeScales {
 public:
  /// `scales`: the address of those of this lane's features, in a record.
  __device__ __forceinline__ void load(uint32_t scales) {
    using Units = ZeroPair<__half, kBits>;
    // decode() leaves codes divided by these.
    constexpr uint32_t kUnits = half_bits(Units::unit(0)) | half_bits(Units::unit(2)) << 16;
    const uint32_t pair = multiply(ptx::load_shared_4(scales), kUnits);
    asm("{\n"
        ".reg .f16 low, high;\n"
        "mov.b32 {low, high}, %2;\n"
        "mov.b32 %0, {low, low};\n"
        "mov.b32 %1, {high, high};\n"
        "}"
        : "=r"(low_), "=r"(high_)
        : "r"(pair));
  }

  __device__ __forceinline__ void apply(uint32_t (&fragment)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = multiply(fragment[i], i % 2 == 0 ? low_ : high_);
  }

 private:
  // Of a power of two.
  static constexpr uint32_t half_bits(float value) {
    uint32_t exponent = 15;
    for (; value > 1; value /= 2) ++exponent;
    return exponent << 10;
  }
  __device__ __forceinline__ static uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
  }

  uint32_t low_, high_;  // each twice
};

}  // namespace marlinq::cuda::sm90
