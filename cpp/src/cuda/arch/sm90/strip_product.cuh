// What the kernels for few tokens multiply: packed codes in shared memory, 16 features at a time, with rows of x.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/arch/sm80/group_values.cuh"
#include "cuda/arch/sm80/layout.hpp"
#include "cuda/device/dequantize.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/mma.cuh"

namespace marlinq::cuda::sm90 {

using sm80::Layout;

/// The product of one group with kStrips strips, before its scales.
template <class T, int kBits, int kTokenTiles, int kStrips>
class StripProduct {
  // With more tokens the sums of x cost more than they save.
  using Codes = std::conditional_t<kTokenTiles == 1, OffsetCodes<T, kBits>, NoOffsetCodes>;

 public:
  static constexpr int kStripBytes = 128 * kBits;  // codes of a strip and chunk

  using Values = sm80::GroupValues<T, kBits, kStrips,
                                   std::conditional_t<Codes::kHas, ZeroFloats, ZeroPair<T, kBits>>>;

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
  template <int kSteps, int kChunkBytes, class XAddress>
  __device__ __forceinline__ void add(uint32_t codes, int first, const Values& values,
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
#pragma unroll
        for (int i = 0; i < 2 && pair * 2 + i < kLoadSteps; ++i) {
#pragma unroll
          for (int s = 0; s < kStrips; ++s) {
            uint32_t a[4];
            const uint32_t* const code = &words[s][(pair * 2 + i) * kStepWords];
            if constexpr (Codes::kHas) {
              Codes::decode(a, code);
            } else {
              decode(a, code, values.zero[s], T());
            }
#pragma unroll
            for (int t = 0; t < kTokenTiles; ++t)
              ptx::mma_m16n8k16<T>(part_[s][t], a, x[t][i * 2], x[t][i * 2 + 1]);
          }
          if constexpr (Codes::kHas) {
            const uint32_t ones[4] = {Codes::kOnes, Codes::kOnes, Codes::kOnes, Codes::kOnes};
#pragma unroll
            for (int t = 0; t < kTokenTiles; ++t)
              ptx::mma_m16n8k16<T>(x_[t], ones, x[t][i * 2], x[t][i * 2 + 1]);
          }
        }
      }
    }
  }

  /// Adds it to the sums of the strips from kFirst on.
  template <int kFirst, int kAll>
  __device__ __forceinline__ void finish(float (&sum)[kAll][kTokenTiles][4], const Values& values,
                                         bool has_zeros) const {
    if constexpr (!Codes::kHas) {
      add_to<kFirst>(sum, values, [&](int s, int t, int i) { return part_[s][t][i]; });
    } else if (has_zeros) {
      add_to<kFirst>(sum, values, [&](int s, int t, int i) {
        const float zero = offset(i < 2 ? values.zero[s].low : values.zero[s].high);
        return __fmaf_rn(part_[s][t][i], unit(i), -zero * x_[t][i % 2]);
      });
    } else {
      // One for all features.
      const float zero = offset(values.zero[0].low);
      add_to<kFirst>(sum, values, [&](int s, int t, int i) {
        return __fmaf_rn(part_[s][t][i], unit(i), -zero * x_[t][i % 2]);
      });
    }
  }

 private:
  __device__ __forceinline__ static constexpr float unit(int i) {
    return i < 2 ? Codes::kUnit : Codes::kUpperUnit;
  }

  __device__ __forceinline__ static float offset(float zero) {
    if constexpr (Codes::kOffset == 0.0f) return zero;
    return zero + Codes::kOffset;
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
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) words[i] = ptx::load_shared_4(address + i * 4);
    }
  }

  float part_[kStrips][kTokenTiles][4];
  float x_[kTokenTiles][4];  // sums of rows of x: those of elements i and i + 2 are the same
};

}  // namespace marlinq::cuda::sm90
