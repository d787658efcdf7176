// The last step of the kernels over experts: weights of tokens, bias, activation, one rounding, the rows of
// the caller.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/arch/sm80/expert_tiles.cuh"
#include "cuda/arch/sm80/layout.hpp"
#include "cuda/arch/sm80/output.cuh"
#include "cuda/moe/activation.cuh"
#include "cuda/problem.hpp"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/store.cuh"

namespace marlinq::cuda::sm80 {

/// Stores a warp's sums of 64 features x kTokenTiles * 8 tokens, of which the first token_tiles * 8 have
/// rows. A lane's sums of a strip and a token tile are features g and g + 8 of tokens 2t and 2t + 1. With
/// an activation, strips 0 and 1 are gates, and strips 2 and 3 are what meets them.
template <class T, int kTokenTiles, class Params>
class ExpertOutput {
 public:
  static constexpr int kStrips = Layout::kBlockStrips;
  using Sums = float[kStrips][kTokenTiles][4];

  /// `y`, `weight`: of each token, in shared memory; y is negative where there is no row.
  __device__ __forceinline__ ExpertOutput(const Params& params, Sums& sum, const int* y,
                                          const float* weight, int token_tiles)
      : params_(params), sum_(sum), y_(y), weight_(weight), token_tiles_(token_tiles) {}

  /// To features `feature` to `last` - 1 of y at most.
  __device__ __forceinline__ void store(int feature, int last, int expert) {
    const WeightView& w = params_.problem.weight;
    const float* bias = w.bias != nullptr ? w.bias + expert * (params_.expert_bytes / 4) : nullptr;
    if (params_.weights != nullptr && !params_.weights_bias) weigh();
    if (params_.activates) {
      store_activated(feature, last, bias);
      return;
    }
    if (bias != nullptr) add_bias<0, kStrips>(bias, feature, w.n);
    if (params_.weights != nullptr && params_.weights_bias) weigh();
    if (params_.pairs) {
      store_pairs<kStrips>(feature, min(last, w.n));
    } else if (params_.problem.y_type == FloatType::kF32) {
      store_singles<float>(feature, min(last, w.n));
    } else if (params_.problem.y_type == FloatType::kF16) {
      store_singles<__half>(feature, min(last, w.n));
    } else {
      store_singles<__nv_bfloat16>(feature, min(last, w.n));
    }
  }

 private:
  static constexpr int kHalf = kStrips / 2;

  __device__ __forceinline__ void weigh() {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      const float* weights = weight_ + t * 8 + threadIdx.x % 4 * 2;
      const float even = weights[0];
      const float odd = weights[1];
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        sum_[s][t][0] *= even;
        sum_[s][t][1] *= odd;
        sum_[s][t][2] *= even;
        sum_[s][t][3] *= odd;
      }
    }
  }

  // To strips kFirst to kLast - 1, of which the first begins with `feature`.
  template <int kFirst, int kLast>
  __device__ __forceinline__ void add_bias(const float* bias, int feature, int features) {
#pragma unroll
    for (int s = kFirst; s < kLast; ++s) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const int f = feature + (s - kFirst) * Layout::kStripFeatures + upper * 8 + lane() / 4;
        const float value = f < features ? __ldg(bias + f) : 0.0f;
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
          sum_[s][t][upper * 2] += value;
          sum_[s][t][upper * 2 + 1] += value;
        }
      }
    }
  }

  __device__ __forceinline__ void store_activated(int feature, int last, const float* bias) {
    const int outputs = params_.problem.weight.n / 2;
    if (bias != nullptr) {
      add_bias<0, kHalf>(bias, feature, outputs);
      add_bias<kHalf, kStrips>(bias + outputs, feature, outputs);
    }
    switch (params_.activation) {
      case Activation::kSilu:
        activate<Activation::kSilu>();
        break;
      case Activation::kGelu:
        activate<Activation::kGelu>();
        break;
      case Activation::kGeluTanh:
        activate<Activation::kGeluTanh>();
        break;
      case Activation::kClampedSwiglu:
        activate<Activation::kClampedSwiglu>();
        break;
    }
    store_pairs<kHalf>(feature, min(last, outputs));
  }

  template <Activation kActivation>
  __device__ __forceinline__ void activate() {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      if (t >= token_tiles_) break;
#pragma unroll
      for (int s = 0; s < kHalf; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum_[s][t][i] = activated<kActivation>(sum_[s][t][i], sum_[s + kHalf][t][i]);
        }
      }
    }
  }

  // Two features at a time: turned so that a lane has 2t and 2t + 1 of token g, and those 8 on.
  template <int kStored>
  __device__ __forceinline__ void store_pairs(int first_feature, int outputs) {
    const GemmProblem& p = params_.problem;
    const int feature = first_feature + lane() % 4 * 2;
    const int features = outputs - feature;
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      if (t >= token_tiles_) break;
      const int row = y_[t * 8 + lane() / 4];
      auto* y = static_cast<uint16_t*>(p.y) + row * p.y_stride + feature;
#pragma unroll
      for (int s = 0; s < kStored; ++s) {
        const auto& sum = sum_[s][t];
        const uint32_t pairs[2] = {ptx::transpose_8x8(round_pair<T>(sum[0], sum[1])),
                                   ptx::transpose_8x8(round_pair<T>(sum[2], sum[3]))};
        constexpr int kStrip = Layout::kStripFeatures;
        ptx::store_if(row >= 0 && s * kStrip < features, y + s * kStrip, pairs[0]);
        ptx::store_if(row >= 0 && s * kStrip + 8 < features, y + s * kStrip + 8, pairs[1]);
      }
    }
  }

  template <class Y>
  __device__ __forceinline__ void store_singles(int first_feature, int outputs) {
    const GemmProblem& p = params_.problem;
    const int feature = first_feature + lane() / 4;
    const int features = outputs - feature;
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      if (t >= token_tiles_) break;
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int row = y_[t * 8 + lane() % 4 * 2 + odd];
        auto* y = static_cast<Y*>(p.y) + row * p.y_stride + feature;
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
#pragma unroll
          for (int upper = 0; upper < 2; ++upper) {
            const int at = s * Layout::kStripFeatures + upper * 8;
            ptx::store_if(row >= 0 && at < features, y + at,
                          round_to<Y>(sum_[s][t][upper * 2 + odd]));
          }
        }
      }
    }
  }

  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }

  const Params& params_;
  Sums& sum_;
  const int* y_;
  const float* weight_;
  int token_tiles_;
};

/// Features of y that a packed block has.
template <class Params>
__device__ __forceinline__ int output_features(const Params& params) {
  return Layout::kBlockFeatures / (params.activates ? 2 : 1);
}

/// The rows of a tile whose expert is not here become 0, in `blocks` blocks of features from `block` on; by
/// `threads` threads.
template <class Params, class Entries>
__device__ __forceinline__ void store_zero_rows(const Params& params, const Entries& entries,
                                                const TokenTile& tile, int tokens, int block,
                                                int blocks, int thread, int threads) {
  const GemmProblem& p = params.problem;
  const int outputs = params.activates ? p.weight.n / 2 : p.weight.n;
  const int width = output_features(params);
  const int first = block * width;
  const int last = min(first + blocks * width, outputs);
#pragma unroll 1
  for (int i = 0; i < tokens; ++i) {
    const RowPlace place = params.rows.row(entries, tile, i);
    if (place.x < 0) continue;
#pragma unroll 1
    for (int f = first + thread; f < last; f += threads) {
      const int64_t y = place.y * p.y_stride + f;
      if (p.y_type == FloatType::kF32) {
        static_cast<float*>(p.y)[y] = 0.0f;
      } else {
        static_cast<uint16_t*>(p.y)[y] = 0;
      }
    }
  }
}

}  // namespace marlinq::cuda::sm80
