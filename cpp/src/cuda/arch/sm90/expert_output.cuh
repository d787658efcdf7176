// The last step of the wgmma kernel over experts: weights of tokens, bias, activation, one rounding, the
// rows of the caller.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/arch/sm80/output.cuh"
#include "cuda/arch/sm90/expert_tiles.cuh"
#include "cuda/moe/activation.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/store.cuh"

namespace marlinq::cuda::sm90 {

/// Stores a warpgroup's sums of its packed blocks. A lane's sums 4 j + i of a block are feature g of the
/// warp's strip, of g + 8 for i of 2 and 3, and tokens 8 j + 2t and 8 j + 2t + 1.
template <class S, class Rows>
class ExpertTileOutput {
 public:
  using T = typename S::T;
  using Sums = float[S::kGroupBlocks][S::kSums];

  /// `output`: S::kOutputBytes of shared memory.
  __device__ __forceinline__ ExpertTileOutput(const ExpertTileParams<Rows>& params, Sums& sum,
                                              const ExpertSegment<S>& at, uint32_t output)
      : params_(params), p_(params.problem), sum_(sum), at_(at), output_(output) {
    group_ = threadIdx.x / 128;
    warp_ = threadIdx.x / 32 % 4;
    lane_ = threadIdx.x % 32;
  }

  __device__ __forceinline__ void store() {
    const WeightView& w = p_.weight;
    const float* bias = w.bias != nullptr && at_.expert >= 0
                            ? w.bias + at_.expert * (params_.expert_bytes / 4)
                            : nullptr;
    if (params_.weights != nullptr && !params_.weights_bias) weigh();
    if (params_.activates) {
      const int outputs = w.n / 2;
      const int block = at_.feature_tile * S::kGroups + group_;
      if (bias != nullptr) {
        add_bias(0, bias, block, outputs);
        add_bias(1, bias + outputs, block, outputs);
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
      store_block(0, block, outputs);
      return;
    }
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) {
      const int block = at_.feature_tile * S::kBlocks + group_ * S::kGroupBlocks + b;
      if (bias != nullptr) add_bias(b, bias, block, w.n);
    }
    if (params_.weights != nullptr && params_.weights_bias) weigh();
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) {
      store_block(b, at_.feature_tile * S::kBlocks + group_ * S::kGroupBlocks + b, w.n);
    }
  }

 private:
  __device__ __forceinline__ void meet_group() const { ptx::named_barrier(2 + group_, 128); }

  __device__ __forceinline__ void weigh() {
#pragma unroll
    for (int j = 0; j < S::kSums / 4; ++j) {
      const float2 weight = *reinterpret_cast<const float2*>(at_.weight + 8 * j + lane_ % 4 * 2);
#pragma unroll
      for (int b = 0; b < S::kGroupBlocks; ++b) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum_[b][4 * j + i] *= i % 2 == 0 ? weight.x : weight.y;
      }
    }
  }

  __device__ __forceinline__ int feature_of(int block) const {
    return block * Layout::kBlockFeatures + warp_ * Layout::kStripFeatures + lane_ / 4;
  }

  __device__ __forceinline__ void add_bias(int b, const float* bias, int block, int features) {
    const int feature = feature_of(block);
    const float low = feature < features ? __ldg(bias + feature) : 0.0f;
    const float high = feature + 8 < features ? __ldg(bias + feature + 8) : 0.0f;
#pragma unroll
    for (int i = 0; i < S::kSums; ++i) sum_[b][i] += i / 2 % 2 == 0 ? low : high;
  }

  template <Activation kActivation>
  __device__ __forceinline__ void activate() {
#pragma unroll
    for (int j = 0; j < S::kSums / 4; ++j) {
      if (8 * j >= at_.tokens) break;
#pragma unroll
      for (int i = 4 * j; i < 4 * j + 4; ++i) {
        sum_[0][i] = activated<kActivation>(sum_[0][i], sum_[1][i]);
      }
    }
  }

  __device__ __forceinline__ void store_block(int b, int block, int outputs) {
    if (params_.rows_together) {
      store_rows(b, block * Layout::kBlockFeatures, outputs);
    } else if (p_.y_type == FloatType::kF32) {
      store_singles<float>(b, feature_of(block), outputs);
    } else if (p_.y_type == FloatType::kF16) {
      store_singles<__half>(b, feature_of(block), outputs);
    } else {
      store_singles<__nv_bfloat16>(b, feature_of(block), outputs);
    }
  }

  // Through shared memory, so that a row of 64 features is written at once; all rows together, since what runs once a
  // tile waits for each of its instructions.
  __device__ __forceinline__ void store_rows(int b, int first_feature, int outputs) const {
    const uint32_t turned_rows = output_ + group_ * S::kGroupOutputBytes;
    meet_group();  // the rows before have been read
#pragma unroll
    for (int j = 0; j < S::kTokens / 8; j += 2) {
      const uint32_t turned[4] = {sm80::round_pair<T>(sum_[b][4 * j], sum_[b][4 * j + 1]),
                                  sm80::round_pair<T>(sum_[b][4 * j + 2], sum_[b][4 * j + 3]),
                                  sm80::round_pair<T>(sum_[b][4 * j + 4], sum_[b][4 * j + 5]),
                                  sm80::round_pair<T>(sum_[b][4 * j + 6], sum_[b][4 * j + 7])};
      ptx::stmatrix_x4_transposed(
          turned_rows +
              sm80::x_piece_place(8 * (j + lane_ / 16) + lane_ % 8, 2 * warp_ + lane_ / 8 % 2),
          turned);
    }
    meet_group();
    const int thread = threadIdx.x % 128;
    const int piece = thread % 8;
    if (first_feature + piece * 8 >= outputs) return;
    auto* const y = reinterpret_cast<uint4*>(static_cast<T*>(p_.y) + first_feature) + piece;
    const uint32_t* const to = at_.y + thread / 8;
    const uint32_t from = turned_rows + sm80::x_piece_place(thread / 8, piece);
    uint4 values[S::kTokens / 16];
#pragma unroll
    for (int i = 0; i < S::kTokens / 16; ++i) {
      values[i] = ptx::load_shared_16(from + i * 16 * sm80::kXRowBytes);
    }
#pragma unroll
    for (int i = 0; i < S::kTokens / 16; ++i) {
      if (to[16 * i] != ExpertSegment<S>::kNoRow) y[to[16 * i]] = values[i];
    }
  }

  template <class Y>
  __device__ __forceinline__ void store_singles(int b, int feature, int outputs) const {
    auto* const y = static_cast<Y*>(p_.y) + feature;
    const bool low = feature < outputs;
    const bool high = feature + 8 < outputs;
#pragma unroll
    for (int j = 0; j < S::kSums / 4; ++j) {
      if (8 * j >= at_.tokens) break;
      const uint2 rows = *reinterpret_cast<const uint2*>(at_.y + 8 * j + lane_ % 4 * 2);
      const bool has_even = rows.x != ExpertSegment<S>::kNoRow;
      const bool has_odd = rows.y != ExpertSegment<S>::kNoRow;
      Y* const even = y + rows.x * p_.y_stride;
      Y* const odd = y + rows.y * p_.y_stride;
      const float* sums = &sum_[b][4 * j];
      ptx::store_if(has_even && low, even, sm80::round_to<Y>(sums[0]));
      ptx::store_if(has_odd && low, odd, sm80::round_to<Y>(sums[1]));
      ptx::store_if(has_even && high, even + 8, sm80::round_to<Y>(sums[2]));
      ptx::store_if(has_odd && high, odd + 8, sm80::round_to<Y>(sums[3]));
    }
  }

  const ExpertTileParams<Rows>& params_;
  const GemmProblem& p_;
  Sums& sum_;
  const ExpertSegment<S>& at_;
  uint32_t output_;
  int group_, warp_, lane_;
};

}  // namespace marlinq::cuda::sm90
