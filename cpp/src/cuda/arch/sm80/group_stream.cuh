// Scales and zero points of the quantisation group that a warp is in, one group ahead of its use.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/device/dequantize.cuh"
#include "cuda/problem.hpp"

namespace marlinq::cuda::sm80 {

/// For kStrips strips side by side. Packed groups follow each other, so the next one is known.
template <class T, int kBits, int kStrips>
class GroupStream {
 public:
  __device__ __forceinline__ GroupStream(const WeightView& weight, int first_strip)
      : w_(weight), first_strip_(first_strip), last_strip_((weight.n + 15) / 16 - 1) {}

  __device__ __forceinline__ int group() const { return group_; }
  __device__ __forceinline__ const ZeroPair<T, kBits>& zero(int s) const { return zero_[s]; }
  /// Of feature g (half 0) or g + 8 (half 1) of the lane.
  __device__ __forceinline__ float scale(int s, int half) const { return scale_[s][half]; }

  /// Strips beyond the last are read from the last; their features are never stored.
  __device__ __forceinline__ int strip(int s) const { return min(first_strip_ + s, last_strip_); }
  __device__ __forceinline__ void move_to(int first_strip) { first_strip_ = first_strip; }

  /// Asks for a group of the current strips, and take() makes it the current one.
  __device__ __forceinline__ void ask(int group) {
    next_group_ = group;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const int64_t element =
          ((static_cast<int64_t>(strip(s)) * w_.groups + group) * 8 + lane / 4) * 2;
      next_zero_[s] = __ldg(reinterpret_cast<const uint16_t*>(w_.zeros + element));
      if (w_.scale_type == FloatType::kF32) {
        const float2 pair =
            __ldg(reinterpret_cast<const float2*>(static_cast<const float*>(w_.scales) + element));
        next_scale_[s][0] = __float_as_uint(pair.x);
        next_scale_[s][1] = __float_as_uint(pair.y);
      } else {
        next_scale_[s][0] = __ldg(
            reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(w_.scales) + element));
      }
    }
  }

  /// Makes the group asked for the current one and asks for the one after it, if these strips have
  /// one.
  __device__ __forceinline__ void take() {
    group_ = next_group_;
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      zero_[s].set(next_zero_[s] & 0xffu, next_zero_[s] >> 8);
      if (w_.scale_type == FloatType::kF32) {
        scale_[s][0] = __uint_as_float(next_scale_[s][0]);
        scale_[s][1] = __uint_as_float(next_scale_[s][1]);
      } else if (w_.scale_type == FloatType::kF16) {
        const float2 pair = __half22float2(reinterpret_cast<const __half2&>(next_scale_[s][0]));
        scale_[s][0] = pair.x;
        scale_[s][1] = pair.y;
      } else {
        scale_[s][0] = __uint_as_float(next_scale_[s][0] << 16);
        scale_[s][1] = __uint_as_float(next_scale_[s][0] & 0xffff0000u);
      }
    }
    if (group_ + 1 < w_.groups) ask(group_ + 1);
  }

  __device__ __forceinline__ bool has_next() const { return group_ + 1 < w_.groups; }

 private:
  const WeightView& w_;
  int first_strip_, last_strip_;
  int group_ = 0, next_group_ = 0;
  uint32_t next_zero_[kStrips];
  uint32_t next_scale_[kStrips][2];
  ZeroPair<T, kBits> zero_[kStrips];
  float scale_[kStrips][2];
};

/// Packed groups of the four steps of a chunk.
__device__ __forceinline__ int4 load_steps(const WeightView& weight, int chunk) {
  return __ldg(reinterpret_cast<const int4*>(weight.step_group + chunk * 4));
}

}  // namespace marlinq::cuda::sm80
