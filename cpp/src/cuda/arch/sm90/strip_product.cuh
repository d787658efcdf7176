// What the kernels for few tokens multiply: packed codes in shared memory, 16 features at a time, with rows of x.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/arch/sm80/group_values.cuh"
#include "cuda/arch/sm80/layout.hpp"
#include "cuda/arch/sm80/plan.hpp"
#include "cuda/device/dequantize.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/mma.cuh"

namespace marlinq::cuda::sm90 {

using sm80::Layout;
using sm80::Records;

/// The product of one group with kStrips strips, before its scales. kRecords: of such weights alone.
template <class T, int kBits, int kTokenTiles, int kStrips>
class StripProduct {
  // With more tokens the sums of x cost more than they save.
  using Codes = std::conditional_t<kTokenTiles == 1, OffsetCodes<T, kBits>, NoOffsetCodes>;
  // Products of few steps begin with what codes are too large by, which is the same for all strips: less
  // to add in the end. Of more, they would wait for it.
  template <int kSteps>
  static constexpr bool kBeginsWithX = Codes::kHas && kSteps <= 2;

 public:
  static constexpr int kStripBytes = 128 * kBits;  // codes of a strip and chunk
  /// What the sums of element i of a fragment are multiplied by in the end.
  __device__ __forceinline__ static constexpr float final_factor(int i) {
    if constexpr (Codes::kHas) {
      return i < 2 ? Codes::kUnit : Codes::kUpperUnit;
    } else {
      return ZeroPair<T, kBits>::unit(i);
    }
  }

  using Values = sm80::GroupValues<T, kBits, kStrips>;

  /// The values of the group that is multiplied next. Zero points of OffsetCodes are not among them.
  template <Records kRecords>
  __device__ __forceinline__ static void load(Values& values, uint32_t records,
                                              const WeightView& w) {
    if constexpr (Codes::kHas) {
      values.template load_scales<kRecords>(records, w);
    } else {
      values.template load<kRecords>(records, w);
    }
  }

  /// What x is multiplied by for what codes are too large by: that itself where it is the same for all features of a
  /// kind, else 1; negative, and in the units of codes.
  struct XFactors {
    __device__ __forceinline__ explicit XFactors(const WeightView& w) {
      if constexpr (Codes::kHas) {
        const auto middle = static_cast<float>(w.middle);
        low = pair((w.has_zeros ? -1.0f : -middle - Codes::kOffset) / Codes::kUnit);
        high = pair((w.has_zeros ? -1.0f : -middle - Codes::kUpperOffset) / Codes::kUpperUnit);
      }
    }
    uint32_t low, high;

   private:
    __device__ __forceinline__ static uint32_t pair(float value) {
      if constexpr (std::is_same_v<T, __half>) {
        const __half2 both = __float2half2_rn(value);
        return reinterpret_cast<const uint32_t&>(both);
      } else {
        const __nv_bfloat162 both = __float2bfloat162_rn(value);
        return reinterpret_cast<const uint32_t&>(both);
      }
    }
  };

  __device__ __forceinline__ StripProduct() {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x_[t][i] = 0.0f;
#pragma unroll
        for (int s = 0; s < kStrips; ++s) part_[s][t][i] = 0.0f;
      }
    }
  }

  /// Adds kSteps steps, from step `first` on. `codes`: where those of this lane begin, [chunk][strip][piece], from a
  /// chunk to the next kChunkBytes. x_address(t, step): of this lane's row of token tile t, for that step and the next.
  template <int kSteps, int kChunkBytes, Records kRecords, class XAddress>
  __device__ __forceinline__ void add(uint32_t codes, int first, const Values& values,
                                      const XFactors& factors, const WeightView& w,
                                      const XAddress& x_address) {
    constexpr int kStepWords = kBits / 4;
    constexpr int kUnitSteps = 4 / kStepWords;  // of the 16 bytes of a lane
    constexpr int kLoadSteps = kSteps < kUnitSteps ? kSteps : kUnitSteps;
    // 4 bits: units are chunks of all strips; 8 bits: pieces of one strip.
    constexpr int kUnitStride = kBits == 4 ? kChunkBytes : 512;
    codes += first / kUnitSteps * kUnitStride + first % kUnitSteps * (kStepWords * 4);
#pragma unroll
    for (int unit = 0; unit < kSteps; unit += kLoadSteps) {
      uint32_t words[kStrips][kLoadSteps * kStepWords];
#pragma unroll
      for (int s = 0; s < kStrips; ++s)
        load_words(words[s], codes + unit / kUnitSteps * kUnitStride + s * kStripBytes);
#pragma unroll
      for (int pair = 0; pair < (kLoadSteps + 1) / 2; ++pair) {
        uint32_t x[kTokenTiles][4];
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t)
          ptx::ldmatrix_x4(x[t], x_address(t, first + unit + pair * 2));
        constexpr int kPairSteps = kLoadSteps < 2 ? kLoadSteps : 2;
        const auto add_x = [&](int i) {
          const uint32_t all[4] = {factors.low, factors.high, factors.low, factors.high};
#pragma unroll
          for (int t = 0; t < kTokenTiles; ++t)
            ptx::mma_m16n8k16<T>(x_[t], all, x[t][i * 2], x[t][i * 2 + 1]);
        };
        float begin[4];
        if constexpr (kBeginsWithX<kSteps>) {
#pragma unroll
          for (int i = 0; i < kPairSteps; ++i) add_x(i);
#pragma unroll
          for (int i = 0; i < 4; ++i) begin[i] = sm80::has_zeros<kRecords>(w) ? 0.0f : x_[0][i];
        }
#pragma unroll
        for (int i = 0; i < kPairSteps; ++i) {
#pragma unroll
          for (int s = 0; s < kStrips; ++s) {
            uint32_t a[4];
            const uint32_t* const code = &words[s][(pair * 2 + i) * kStepWords];
            if constexpr (Codes::kHas) {
              Codes::decode(a, code);
            } else {
              decode(a, code, values.zero[s], T());
            }
            if constexpr (kBeginsWithX<kSteps>) {
              if (i == 0) {
                ptx::mma_m16n8k16_to<T>(part_[s][0], a, x[0][0], x[0][1], begin);
                continue;
              }
            }
#pragma unroll
            for (int t = 0; t < kTokenTiles; ++t)
              ptx::mma_m16n8k16<T>(part_[s][t], a, x[t][i * 2], x[t][i * 2 + 1]);
          }
          if constexpr (Codes::kHas && !kBeginsWithX<kSteps>) add_x(i);
        }
      }
    }
  }

  /// Adds it, of kSteps steps, to the sums of the strips from kFirst on. `records` are those that `values` come from.
  template <int kFirst, int kSteps, Records kRecords, int kAll>
  __device__ __forceinline__ void finish(float (&sum)[kAll][kTokenTiles][4], const Values& values,
                                         uint32_t records, const WeightView& w) const {
    if constexpr (!Codes::kHas) {
      add_to<kFirst>(sum, values, [&](int s, int t, int i) { return part_[s][t][i]; });
    } else if (sm80::has_zeros<kRecords>(w)) {
      sm80::GroupValues<T, kBits, kStrips, ZeroFloats> zeros;
      zeros.template load_zeros<kRecords>(records, w);
      add_to<kFirst>(sum, values, [&](int s, int t, int i) {
        const float zero = i < 2 ? plus<Codes::kOffset>(zeros.zero[s].low)
                                 : plus<Codes::kUpperOffset>(zeros.zero[s].high);
        return __fmaf_rn(zero, x_[t][i], part_[s][t][i]);
      });
    } else if constexpr (kBeginsWithX<kSteps>) {
      add_to<kFirst>(sum, values, [&](int s, int t, int i) { return part_[s][t][i]; });
    } else {
      add_to<kFirst>(sum, values, [&](int s, int t, int i) { return part_[s][t][i] + x_[t][i]; });
    }
  }

 private:
  template <float kOffset>
  __device__ __forceinline__ static float plus(float zero) {
    if constexpr (kOffset == 0.0f) return zero;
    return zero + kOffset;
  }

  template <int kFirst, int kAll, class Part>
  __device__ __forceinline__ static void add_to(float (&sum)[kAll][kTokenTiles][4],
                                                const Values& values, const Part& part) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& to = sum[kFirst + s][t][i];
          to = __fmaf_rn(values.scale[s][i / 2], part(s, t, i), to);
        }
      }
    }
  }

  template <int kCount>
  __device__ __forceinline__ static void load_words(uint32_t (&words)[kCount], uint32_t address) {
    if constexpr (kCount == 4) {
      const uint4 q = ptx::load_shared_16(address);
      words[0] = q.x;
      words[1] = q.y;
      words[2] = q.z;
      words[3] = q.w;
    } else if constexpr (kCount == 2) {
      const uint2 q = ptx::load_shared_8(address);
      words[0] = q.x;
      words[1] = q.y;
    } else {
      static_assert(kCount == 1);
      words[0] = ptx::load_shared_4(address);
    }
  }

  float part_[kStrips][kTokenTiles][4];
  // Sums of rows of x by XFactors, the same for all features g and for all g + 8.
  float x_[kTokenTiles][4];
};

}  // namespace marlinq::cuda::sm90
