// The dense product of the sm_80 family: y[token][feature] with weights as operand A of mma.sync.
//
// A block of 8 warps computes kTokens tokens x kFeatureWarps * kStrips * 16 features over a range
// of chunks of 64 packed rows; kRowWarps warps share that range, each group of kFeatureWarps warps
// a contiguous part of it. Each group streams its own ring: the x tile (shared by its warps,
// 128-byte rows, swizzled for ldmatrix) and the codes (every lane copies the 16 bytes that it alone
// reads).
//
// Sums: products of one quantisation group in a float32 accumulator, times the scale into a second;
// then over the row warps and over the splits of K, in fixed order. Nothing depends on which block
// finishes when.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/arch/sm80/group_stream.cuh"
#include "cuda/arch/sm80/output.cuh"
#include "cuda/device/dequantize.cuh"
#include "cuda/problem.hpp"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/launch.cuh"
#include "cuda/ptx/mma.cuh"

namespace marlinq::cuda::sm80 {

constexpr int kChunkRows = 64;
constexpr int kWarps = 8;

template <class T_, int kBits_, int kTokens_, int kStrips_, int kFeatureWarps_, int kStages_>
struct Shape {
  using T = T_;
  static constexpr int kBits = kBits_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kStrips = kStrips_;
  static constexpr int kFeatureWarps = kFeatureWarps_;
  static constexpr int kRowWarps = kWarps / kFeatureWarps_;
  static constexpr int kStages = kStages_;
  static constexpr int kFeatures = kFeatureWarps * kStrips * 16;
  static constexpr int kTokenTiles = kTokens / 8;
  static constexpr int kGroupThreads = kFeatureWarps * 32;
  static constexpr int kXBytes = kTokens * kChunkRows * 2;
  static constexpr int kPieces = kBits / 4;  // 16-byte pieces of codes a lane, strip and chunk
  static constexpr int kCodeBytes = kFeatureWarps * kStrips * kPieces * 512;
  static constexpr int kStageBytes = kXBytes + kCodeBytes;
  static constexpr int kRingBytes = kRowWarps * kStages * kStageBytes;
  // The sums of the row warps, [row warp][token][feature], padded by 4 floats against bank
  // conflicts.
  static constexpr int kSumStride = kFeatures + 4;
  static constexpr int kSumBytes = kRowWarps * kTokens * kSumStride * 4;
  static constexpr int kSharedBytes = kRingBytes > kSumBytes ? kRingBytes : kSumBytes;
};

struct KernelParams {
  GemmProblem problem;
  SplitScratch scratch;
  int splits;
};

template <class S>
class Mainloop {
 public:
  using T = typename S::T;

  __device__ __forceinline__ Mainloop(const KernelParams& params, unsigned char* shared)
      : p_(params.problem),
        w_(params.problem.weight),
        groups_(params.problem.weight, blockIdx.y * (S::kFeatures / 16) +
                                           threadIdx.x / 32 % S::kFeatureWarps * S::kStrips) {
    const int warp = threadIdx.x / 32;
    lane_ = threadIdx.x % 32;
    row_warp_ = warp / S::kFeatureWarps;
    feature_warp_ = warp % S::kFeatureWarps;
    group_thread_ = threadIdx.x % S::kGroupThreads;
    ring_ = ptx::shared_address(shared) + row_warp_ * S::kStages * S::kStageBytes;
    chunks_ = w_.packed_rows / kChunkRows;
    first_token_ = blockIdx.x * S::kTokens;
    const int split_begin =
        static_cast<int>(static_cast<int64_t>(chunks_) * blockIdx.z / params.splits);
    const int split_end =
        static_cast<int>(static_cast<int64_t>(chunks_) * (blockIdx.z + 1) / params.splits);
    const int length = split_end - split_begin;
    begin_ = split_begin + length * row_warp_ / S::kRowWarps;
    end_ = split_begin + length * (row_warp_ + 1) / S::kRowWarps;
  }

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum_[s][t][i] = part_[s][t][i] = 0.0f;
      }
    }
    if (begin_ >= end_) return;
#pragma unroll
    for (int stage = 0; stage < S::kStages - 1; ++stage) {
      if (begin_ + stage < end_) fill(stage, begin_ + stage);
      ptx::copy_commit();
    }
    steps_ = load_steps(w_, begin_);
    groups_.ask(steps_.x);
    groups_.take();
    int stage = 0;
    for (int chunk = begin_; chunk < end_; ++chunk) {
      ptx::copy_wait<S::kStages - 2>();
      if (S::kFeatureWarps == 1) {
        __syncwarp();
      } else {
        ptx::named_barrier(1 + row_warp_, S::kGroupThreads);
      }
      // The slot read in the last round is free: all warps of the group have passed the barrier.
      const int next = chunk + S::kStages - 1;
      if (next < end_) fill(stage == 0 ? S::kStages - 1 : stage - 1, next);
      ptx::copy_commit();
      const int4 steps = steps_;
      if (chunk + 1 < end_) steps_ = load_steps(w_, chunk + 1);
      multiply(stage, steps);
      stage = stage + 1 == S::kStages ? 0 : stage + 1;
    }
    finish_group();
  }

  /// Sums of this warp into shared memory [row warp][token][feature].
  __device__ __forceinline__ void store_sums(float* sums) const {
    const int g = lane_ / 4;
    const int t = lane_ % 4;
    float* mine = sums + row_warp_ * S::kTokens * S::kSumStride;
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
      const int feature = (feature_warp_ * S::kStrips + s) * 16 + g;
#pragma unroll
      for (int tile = 0; tile < S::kTokenTiles; ++tile) {
        const int token = tile * 8 + 2 * t;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          mine[(token + (i & 1)) * S::kSumStride + feature + 8 * (i >> 1)] = sum_[s][tile][i];
        }
      }
    }
  }

 private:
  // Starts the copies of one chunk into a ring slot.
  __device__ __forceinline__ void fill(int slot, int chunk) {
    const uint32_t stage = ring_ + slot * S::kStageBytes;
    const auto* x = static_cast<const T*>(p_.x);
    const int column0 = chunk * kChunkRows;
#pragma unroll
    for (int i = 0; i < S::kTokens * 8 / S::kGroupThreads || i == 0; ++i) {
      const int piece = i * S::kGroupThreads + group_thread_;
      if (S::kTokens * 8 < S::kGroupThreads && piece >= S::kTokens * 8) break;
      const int token = piece / 8;
      const int part = piece % 8;
      const int column = column0 + part * 8;
      int bytes = 2 * (p_.x_columns - column);
      bytes = bytes < 0 ? 0 : (bytes > 16 ? 16 : bytes);
      if (first_token_ + token >= p_.m) bytes = 0;
      const T* source = bytes > 0 ? x + (first_token_ + token) * p_.x_stride + column : x;
      ptx::copy_async_zfill(stage + token * 128 + ((part ^ (token % 8)) * 16), source, bytes);
    }
    const uint32_t codes =
        stage + S::kXBytes + feature_warp_ * S::kStrips * S::kPieces * 512 + lane_ * 16;
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
      const uint32_t* source =
          w_.codes +
          (static_cast<int64_t>(groups_.strip(s)) * chunks_ + chunk) * (S::kPieces * 128) +
          lane_ * 4;
#pragma unroll
      for (int piece = 0; piece < S::kPieces; ++piece) {
        ptx::copy_async(codes + (s * S::kPieces + piece) * 512, source + piece * 128);
      }
    }
  }

  __device__ __forceinline__ void finish_group() {
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum_[s][t][i] = fmaf(groups_.scale(s, i / 2), part_[s][t][i], sum_[s][t][i]);
          part_[s][t][i] = 0.0f;
        }
      }
    }
  }

  __device__ __forceinline__ void multiply(int slot, const int4& steps) {
    const uint32_t stage = ring_ + slot * S::kStageBytes;
    const uint32_t codes =
        stage + S::kXBytes + feature_warp_ * S::kStrips * S::kPieces * 512 + lane_ * 16;
    uint32_t words[S::kStrips][S::kPieces * 4];
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
      for (int piece = 0; piece < S::kPieces; ++piece) {
        const uint4 q = ptx::load_shared_16(codes + (s * S::kPieces + piece) * 512);
        words[s][piece * 4] = q.x;
        words[s][piece * 4 + 1] = q.y;
        words[s][piece * 4 + 2] = q.z;
        words[s][piece * 4 + 3] = q.w;
      }
    }
    const int step_group[4] = {steps.x, steps.y, steps.z, steps.w};
    uint32_t b[S::kTokenTiles == 1 ? 1 : S::kTokenTiles / 2][4];
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      if (step_group[step] != groups_.group()) {
        finish_group();
        groups_.take();
      }
      load_tokens(b, stage, step);
#pragma unroll
      for (int s = 0; s < S::kStrips; ++s) {
        uint32_t a[4];
        decode(a, &words[s][step * S::kPieces], groups_.zero(s), T());
#pragma unroll
        for (int t = 0; t < S::kTokenTiles; ++t) {
          if constexpr (S::kTokenTiles == 1) {
            ptx::mma_m16n8k16<T>(part_[s][t], a, b[0][(step % 2) * 2], b[0][(step % 2) * 2 + 1]);
          } else {
            ptx::mma_m16n8k16<T>(part_[s][t], a, b[t / 2][(t % 2) * 2], b[t / 2][(t % 2) * 2 + 1]);
          }
        }
      }
    }
  }

  // Fragments of x for 16 rows: pairs of token tiles, or for a single tile two steps at once.
  template <int kPairs>
  __device__ __forceinline__ void load_tokens(uint32_t (&b)[kPairs][4], uint32_t stage,
                                              int step) const {
    const int matrix = lane_ / 8;
    const int row = lane_ % 8;
    if constexpr (S::kTokenTiles == 1) {
      if (step % 2 != 0) return;
      const int part = step * 2 + matrix;
      ptx::ldmatrix_x4(b[0], stage + row * 128 + ((part ^ row) * 16));
    } else {
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const int token = pair * 16 + (matrix / 2) * 8 + row;
        const int part = step * 2 + matrix % 2;
        ptx::ldmatrix_x4(b[pair], stage + token * 128 + ((part ^ row) * 16));
      }
    }
  }

  const GemmProblem& p_;
  const WeightView& w_;
  uint32_t ring_;
  int lane_, row_warp_, feature_warp_, group_thread_;
  int chunks_, first_token_, begin_, end_;
  int4 steps_;
  GroupStream<T, S::kBits, S::kStrips> groups_;
  float sum_[S::kStrips][S::kTokenTiles][4];
  float part_[S::kStrips][S::kTokenTiles][4];
};

template <class S>
__global__ void __launch_bounds__(kWarps * 32) gemm(const __grid_constant__ KernelParams params) {
  extern __shared__ __align__(128) unsigned char shared[];
  const GemmProblem& p = params.problem;
  Mainloop<S> loop(params, shared);
  ptx::wait_for_predecessor();
  loop.run();
  ptx::launch_dependents();
  ptx::copy_wait<0>();
  __syncthreads();
  auto* sums = reinterpret_cast<float*>(shared);
  loop.store_sums(sums);
  __syncthreads();

  const int first_token = blockIdx.x * S::kTokens;
  const int first_feature = blockIdx.y * S::kFeatures;
  const int tokens = min(S::kTokens, p.m - first_token);
  const int features = min(S::kFeatures, p.weight.n - first_feature);
  const auto row_warp_sum = [&](int token, int feature) {
    float value = 0.0f;
#pragma unroll
    for (int w = 0; w < S::kRowWarps; ++w)
      value += sums[(w * S::kTokens + token) * S::kSumStride + feature];
    return value;
  };
  const int tile = blockIdx.y * gridDim.x + blockIdx.x;
  const int64_t tile_floats = S::kTokens * S::kFeatures;
  if (params.splits > 1) {
    float* partial = params.scratch.partials +
                     (static_cast<int64_t>(tile) * params.splits + blockIdx.z) * tile_floats;
    for (int i = threadIdx.x; i < tokens * S::kFeatures; i += kWarps * 32) {
      partial[i] = row_warp_sum(i / S::kFeatures, i % S::kFeatures);
    }
    __threadfence();
    __syncthreads();
    __shared__ bool last;
    if (threadIdx.x == 0) {
      last =
          atomicAdd(params.scratch.counters + tile, 1u) == static_cast<uint32_t>(params.splits - 1);
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (threadIdx.x == 0) params.scratch.counters[tile] = 0;
    const float* all =
        params.scratch.partials + static_cast<int64_t>(tile) * params.splits * tile_floats;
    for (int i = threadIdx.x; i < tokens * S::kFeatures; i += kWarps * 32) {
      const int feature = i % S::kFeatures;
      if (feature >= features) continue;
      float value = 0.0f;
      for (int split = 0; split < params.splits; ++split)
        value += __ldcg(all + split * tile_floats + i);
      store_output(p, first_token + i / S::kFeatures, first_feature + feature, value);
    }
    return;
  }
  for (int i = threadIdx.x; i < tokens * S::kFeatures; i += kWarps * 32) {
    const int feature = i % S::kFeatures;
    if (feature < features) {
      store_output(p, first_token + i / S::kFeatures, first_feature + feature,
                   row_warp_sum(i / S::kFeatures, feature));
    }
  }
}

}  // namespace marlinq::cuda::sm80
