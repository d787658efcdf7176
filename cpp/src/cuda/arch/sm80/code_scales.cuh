// Short groups: codes multiplied by their scales.
//
// Sums in units of a group's scale have to be multiplied where a group ends, by each thread and after all its products:
// with short groups that takes as long as products. A fragment has few registers, which can be multiplied instead, at
// the price of one more rounding of each weight.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/arch/sm80/group_values.cuh"
#include "cuda/arch/sm80/layout.hpp"
#include "cuda/device/dequantize.cuh"
#include "cuda/problem.hpp"
#include "cuda/ptx/copy.cuh"

namespace marlinq::cuda::sm80 {

/// Twice the lower and twice the upper half of a pair; instructions can read a pair so.
struct EachTwice {
  uint32_t low, high;
  __device__ __forceinline__ void set(uint32_t pair) {
    asm("{\n"
        ".reg .b16 l, h;\n"
        "mov.b32 {l, h}, %2;\n"
        "mov.b32 %0, {l, l};\n"
        "mov.b32 %1, {h, h};\n"
        "}"
        : "=r"(low), "=r"(high)
        : "r"(pair));
  }
  /// For element i of a fragment.
  __device__ __forceinline__ uint32_t of(int i) const { return i % 2 == 0 ? low : high; }
};

/// Scales of one group for the two features of a lane, g and g + 8.
///   load(record, type)   from the record of a strip in shared memory
///   apply(fragment)      multiplies what decode() made
///   unit(i)              what sums are multiplied by in the end: those of element i of an accumulator
template <class T, int kBits>
class CodeScales;

/// Of float16 (WeightView::small_scales).
template <int kBits>
class CodeScales<__half, kBits> {
 public:
  __device__ __forceinline__ void load(uint32_t record, FloatType) {
    // What decode() divides by comes back here: codes may be too small for scales.
    constexpr uint32_t kUnits = half_bits(Codes::unit(0)) | half_bits(Codes::unit(2)) << 16;
    scale_.set(multiply(ptx::load_shared_4(record + threadIdx.x % 32 / 4 * 4), kUnits));
  }

  __device__ __forceinline__ void apply(uint32_t (&fragment)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = multiply(fragment[i], scale_.of(i));
  }

  __device__ __forceinline__ static constexpr float unit(int) { return 1.0f; }

 private:
  using Codes = ZeroPair<__half, kBits>;

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

  EachTwice scale_;
};

/// Of any type: a bfloat16, and what that leaves, so that the product is rounded once.
template <int kBits>
class CodeScales<__nv_bfloat16, kBits> {
 public:
  __device__ __forceinline__ void load(uint32_t record, FloatType type) {
    const uint32_t place = record + threadIdx.x % 32 / 4 * 4;
    float2 scale;
    if (type == FloatType::kF16) {
      const uint32_t pair = ptx::load_shared_4(place);
      scale = __half22float2(reinterpret_cast<const __half2&>(pair));
    } else if (type == FloatType::kBF16) {
      scale = widen(ptx::load_shared_4(place));
    } else {
      const uint2 pair = ptx::load_shared_8(place + threadIdx.x % 32 / 4 * 4);
      scale = make_float2(__uint_as_float(pair.x), __uint_as_float(pair.y));
    }
    const uint32_t rounded = round(scale);
    const float2 most = widen(rounded);
    most_.set(rounded);
    rest_.set(round(make_float2(scale.x - most.x, scale.y - most.y)));
  }

  __device__ __forceinline__ void apply(uint32_t (&fragment)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      constexpr uint32_t kMinusZeros = 0x80008000u;
      const uint32_t rest = multiply_add<__nv_bfloat16>(fragment[i], rest_.of(i), kMinusZeros);
      fragment[i] = multiply_add<__nv_bfloat16>(fragment[i], most_.of(i), rest);
    }
  }

  __device__ __forceinline__ static constexpr float unit(int i) {
    return ZeroPair<__nv_bfloat16, kBits>::unit(i);
  }

 private:
  __device__ __forceinline__ static float2 widen(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
  __device__ __forceinline__ static uint32_t round(float2 values) {
    const __nv_bfloat162 pair = __float22bfloat162_rn(values);
    return reinterpret_cast<const uint32_t&>(pair);
  }

  EachTwice most_, rest_;
};

/// Whether a step of a chunk starts a short group: they have 16 or 32 rows.
__device__ __forceinline__ bool starts_short_group(const WeightView& w, int step) {
  return step % 2 == 0 || w.step_shift == 0;
}

/// After products of codes that were multiplied by their scales: what sums are in, told as others tell it.
template <class T, int kBits, int kStrips>
__device__ __forceinline__ void set_scaled_units(GroupValues<T, kBits, kStrips>& values) {
#pragma unroll
  for (int s = 0; s < kStrips; ++s) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      values.scale[s][i] = CodeScales<T, kBits>::unit(2 * i) / ZeroPair<T, kBits>::unit(2 * i);
    }
  }
}

}  // namespace marlinq::cuda::sm80
