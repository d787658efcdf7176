// Scales and zero points of one quantisation group for the strips of a warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/arch/sm80/plan.hpp"
#include "cuda/device/dequantize.cuh"
#include "cuda/problem.hpp"
#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/copy.cuh"

namespace marlinq::cuda::sm80 {

/// Bytes of a strip's record.
template <Records kRecords>
__device__ __forceinline__ int record_bytes(const WeightView& w) {
  return kRecords == Records::kHalfScales           ? 32
         : kRecords == Records::kHalfScalesAndZeros ? 48
                                                    : w.record_bytes;
}

template <Records kRecords>
__device__ __forceinline__ bool has_zeros(const WeightView& w) {
  return kRecords == Records::kAny ? w.has_zeros : kRecords == Records::kHalfScalesAndZeros;
}

/// A lane holds those of features g and g + 8 of each strip.
template <class T, int kBits, int kStrips, class Zero = ZeroPair<T, kBits>>
struct GroupValues {
  Zero zero[kStrips];
  float scale[kStrips][2];

  /// Before the first group, where records hold no zero points.
  __device__ __forceinline__ void set_middle(const WeightView& w) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) zero[s].set(w.middle * 0x101u);
  }

  /// From the records of the strips in shared memory, one after the other.
  template <Records kRecords = Records::kAny>
  __device__ __forceinline__ void load(uint32_t records, const WeightView& w) {
    load_scales<kRecords>(records, w);
    load_zeros<kRecords>(records, w);
  }

  /// Of float16, from where this lane's two of the first strip are.
  __device__ __forceinline__ void load_half_scales(uint32_t first, int record_bytes) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const uint32_t pair = ptx::load_shared_4(first + s * record_bytes);
      const float2 wide = __half22float2(reinterpret_cast<const __half2&>(pair));
      scale[s][0] = wide.x;
      scale[s][1] = wide.y;
    }
  }

  template <Records kRecords = Records::kAny>
  __device__ __forceinline__ void load_scales(uint32_t records, const WeightView& w) {
    if constexpr (kRecords != Records::kAny) {
      load_half_scales(records + threadIdx.x % 32 / 4 * 4, record_bytes<kRecords>(w));
      return;
    }
    const uint32_t first =
        records + threadIdx.x % 32 / 4 * (w.scale_type == FloatType::kF32 ? 8 : 4);
    const int step = w.record_bytes;
    if (w.scale_type == FloatType::kF16) {
      load_half_scales(first, step);
    } else if (w.scale_type == FloatType::kBF16) {
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        const uint32_t pair = ptx::load_shared_4(first + s * step);
        scale[s][0] = __uint_as_float(pair << 16);
        scale[s][1] = __uint_as_float(pair & 0xffff0000u);
      }
    } else {
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        scale[s][0] = __uint_as_float(ptx::load_shared_4(first + s * step));
        scale[s][1] = __uint_as_float(ptx::load_shared_4(first + s * step + 4));
      }
    }
  }

  template <Records kRecords = Records::kAny>
  __device__ __forceinline__ void load_zeros(uint32_t records, const WeightView& w) {
    if (!has_zeros<kRecords>(w)) return;
    const int step = record_bytes<kRecords>(w);
    // After 16 scales, which are all of the record but its last 16 bytes.
    const uint32_t zeros = records + step - 16 + threadIdx.x % 32 / 4 * 2;
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      zero[s].set(ptx::load_shared_2(zeros + s * step));
    }
  }

  /// What sums in units of these scales are multiplied by in the end.
  __device__ __forceinline__ void final_factors(float (&factor)[kStrips][2]) const {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      factor[s][0] = __fmul_rn(scale[s][0], Zero::unit(0));
      factor[s][1] = __fmul_rn(scale[s][1], Zero::unit(2));
    }
  }

  /// The same as load(); `quotient` is the old scales over the new ones: what sums in units of the old scales
  /// are multiplied by to be in units of the new ones. Before the first group scales are 0.
  template <Records kRecords = Records::kAny>
  __device__ __forceinline__ void change(uint32_t records, const WeightView& w,
                                         float (&quotient)[kStrips][2]) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      quotient[s][0] = scale[s][0];
      quotient[s][1] = scale[s][1];
    }
    load<kRecords>(records, w);
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      quotient[s][0] = ptx::divide_roughly(quotient[s][0], scale[s][0]);
      quotient[s][1] = ptx::divide_roughly(quotient[s][1], scale[s][1]);
    }
  }
};

/// What chunk_groups says of one chunk.
struct ChunkGroups {
  int word;

  __device__ __forceinline__ int first() const { return word >> 4; }
  /// Some step after the first starts a group.
  __device__ __forceinline__ bool changes() const { return (word & 0xe) != 0; }
  __device__ __forceinline__ bool starts(int step) const { return (word >> step & 1) != 0; }
  __device__ __forceinline__ int last() const { return first() + __popc(word & 0xe); }
  __device__ __forceinline__ int count() const { return 1 + __popc(word & 0xe); }
};

__device__ __forceinline__ ChunkGroups look_up_chunk_groups(const WeightView& w, int chunk) {
  return {__ldg(w.chunk_groups + chunk)};
}
/// The same, without a table where groups are of whole chunks.
__device__ __forceinline__ ChunkGroups load_chunk_groups(const WeightView& w, int chunk) {
  return w.chunk_shift >= 0 ? ChunkGroups{(chunk >> w.chunk_shift) << 4}
                            : look_up_chunk_groups(w, chunk);
}

/// The next chunk that a group starts in, where groups are of whole chunks.
__device__ __forceinline__ int next_change(const WeightView& w, int chunk) {
  return ((chunk >> w.chunk_shift) + 1) << w.chunk_shift;
}

}  // namespace marlinq::cuda::sm80
