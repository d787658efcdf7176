// The dense product of the sm_80 family for few tokens: bound by the stream of codes, so nothing
// else may wait.
//
// One block a multiprocessor owns whole groups of kStrips strips. Its items (strip group, chunk of
// 64 packed rows) are one sequence; each warp takes a contiguous run of it and streams the codes
// through a ring of its own, every lane copying the 16 bytes that it alone reads: no barrier in the
// loop. x comes straight from the caches in fragment order. At the end of a strip group or of its
// run a warp leaves its sums in shared memory; at the end of the block they are added in the order
// of the warps, so nothing depends on timing.
//
// Weights do not depend on the kernel before: the ring is filled before the wait for it.
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

template <class T_, int kBits_, int kTokenTiles_, int kStrips_, int kWarps_, int kStages_>
struct StripShape {
  using T = T_;
  static constexpr int kBits = kBits_;
  static constexpr int kTokenTiles = kTokenTiles_;
  static constexpr int kTokens = kTokenTiles * 8;
  static constexpr int kStrips = kStrips_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kStages = kStages_;
  static constexpr int kFeatures = kStrips * 16;
  static constexpr int kPieces = kBits / 4;  // 16-byte pieces a lane, strip and chunk
  static constexpr int kStageBytes = kStrips * kPieces * 512;
  static constexpr int kRingBytes = kWarps * kStages * kStageBytes;
  static constexpr int kSlotFloats = kTokens * kFeatures;  // sums of one warp for one strip group
};

template <class S>
class StripLoop {
 public:
  using T = typename S::T;

  __device__ __forceinline__ StripLoop(const GemmProblem& problem, unsigned char* shared,
                                       float* slots)
      : p_(problem), w_(problem.weight), slots_(slots), groups_(problem.weight, 0) {
    warp_ = threadIdx.x / 32;
    lane_ = threadIdx.x % 32;
    ring_ = ptx::shared_address(shared) + warp_ * S::kStages * S::kStageBytes + lane_ * 16;
    chunks_ = w_.packed_rows / 64;
    strips_ = (w_.n + 15) / 16;
    const int groups = (strips_ + S::kStrips - 1) / S::kStrips;
    first_strip_group_ = static_cast<int>(static_cast<int64_t>(groups) * blockIdx.x / gridDim.x);
    strip_groups_ = static_cast<int>(static_cast<int64_t>(groups) * (blockIdx.x + 1) / gridDim.x) -
                    first_strip_group_;
    items_ = strip_groups_ * chunks_;
    run_ = (items_ + S::kWarps - 1) / S::kWarps;
    begin_ = min(warp_ * run_, items_);
    end_ = min(begin_ + run_, items_);
  }

  __device__ __forceinline__ void run() {
    fill_group_ = begin_ / chunks_;
    fill_chunk_ = begin_ % chunks_;
    strip_group_ = fill_group_;
    chunk_ = fill_chunk_;
#pragma unroll
    for (int stage = 0; stage < S::kStages - 1; ++stage) {
      if (begin_ + stage < end_) fill(stage);
      ptx::copy_commit();
    }
    if (begin_ < end_) {
      steps_ = load_steps(w_, chunk_);
      groups_.move_to(strip(strip_group_, 0));
      groups_.ask(steps_.x);
    }
    ptx::wait_for_predecessor();
    if (begin_ + S::kStages - 1 >= end_) ptx::launch_dependents();
    if (begin_ >= end_) return;
    clear();
    take_group();
    load_tokens(next_tokens_, chunk_);
    int stage = 0;
    for (int item = begin_; item < end_; ++item) {
      ptx::copy_wait<S::kStages - 2>();
      if (item + S::kStages - 1 < end_) {
        fill(stage == 0 ? S::kStages - 1 : stage - 1);
        if (item + S::kStages == end_) ptx::launch_dependents();
      }
      ptx::copy_commit();
      const int4 steps = steps_;
#pragma unroll
      for (int tile = 0; tile < S::kTokenTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 8; ++i) tokens_[tile][i] = next_tokens_[tile][i];
      }
      const bool last_chunk = chunk_ + 1 == chunks_;
      if (item + 1 < end_) {
        load_tokens(next_tokens_, last_chunk ? 0 : chunk_ + 1);
        steps_ = load_steps(w_, last_chunk ? 0 : chunk_ + 1);
      }
      multiply(stage, steps);
      stage = stage + 1 == S::kStages ? 0 : stage + 1;
      if (last_chunk || item + 1 == end_) {
        finish_group();
        store_sums();
        chunk_ = 0;
        ++strip_group_;
        if (item + 1 < end_) take_group();
      } else {
        ++chunk_;
      }
    }
  }

  /// Adds what the warps left, in their order, and writes the output. After a block barrier.
  __device__ __forceinline__ void store_output_tile() const {
    const int total = strip_groups_ * S::kSlotFloats;
    for (int i = threadIdx.x; i < total; i += S::kWarps * 32) {
      const int feature_in_group = i % S::kFeatures;
      const int token = i / S::kFeatures % S::kTokens;
      const int group = i / S::kSlotFloats;
      const int feature = (first_strip_group_ + group) * S::kFeatures + feature_in_group;
      if (token >= p_.m || feature >= w_.n) continue;
      const int first_warp = group * chunks_ / run_;
      const int last_warp = ((group + 1) * chunks_ - 1) / run_;
      float value = 0.0f;
      for (int warp = first_warp; warp <= last_warp; ++warp) {
        value += slots_[(group + warp) * S::kSlotFloats + slot_element(token, feature_in_group)];
      }
      store_output(p_, token, feature, value);
    }
  }

 private:
  // [feature][token]: the two tokens of an accumulator pair are neighbours.
  __device__ __forceinline__ static int slot_element(int token, int feature) {
    return feature * S::kTokens + token;
  }

  // Strips beyond the last are read from the last; their features are never stored.
  __device__ __forceinline__ int strip(int strip_group, int s) const {
    return min((first_strip_group_ + strip_group) * S::kStrips + s, strips_ - 1);
  }

  __device__ __forceinline__ void fill(int slot) {
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
      const uint32_t* source =
          w_.codes +
          (static_cast<int64_t>(strip(fill_group_, s)) * chunks_ + fill_chunk_) *
              (S::kPieces * 128) +
          lane_ * 4;
#pragma unroll
      for (int piece = 0; piece < S::kPieces; ++piece) {
        ptx::copy_async(ring_ + slot * S::kStageBytes + (s * S::kPieces + piece) * 512,
                        source + piece * 128);
      }
    }
    if (++fill_chunk_ == chunks_) {
      fill_chunk_ = 0;
      ++fill_group_;
    }
  }

  // Makes the next group the current one; at the end of the strips' groups that is the first of the
  // next strips.
  __device__ __forceinline__ void take_group() {
    groups_.take();
    if (!groups_.has_next() && strip_group_ + 1 < strip_groups_) {
      groups_.move_to(strip(strip_group_ + 1, 0));
      groups_.ask(0);
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum_[s][t][i] = part_[s][t][i] = 0.0f;
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

  __device__ __forceinline__ void store_sums() {
    float* slot = slots_ + (strip_group_ + warp_) * S::kSlotFloats;
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
        const int feature = s * 16 + lane_ / 4;
        const int token = t * 8 + 2 * (lane_ % 4);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          *reinterpret_cast<float2*>(slot + slot_element(token, feature + 8 * half)) =
              make_float2(sum_[s][t][2 * half], sum_[s][t][2 * half + 1]);
          sum_[s][t][2 * half] = sum_[s][t][2 * half + 1] = 0.0f;
        }
      }
    }
  }

  // Fragments of x for one chunk: registers 2j, 2j + 1 of a tile serve the 16 rows from 16 j on.
  __device__ __forceinline__ void load_tokens(uint32_t (&b)[S::kTokenTiles][8], int chunk) const {
    const int column = chunk * 64 + 2 * (lane_ % 4);
#pragma unroll
    for (int tile = 0; tile < S::kTokenTiles; ++tile) {
      const int token = tile * 8 + lane_ / 4;
      const T* row = static_cast<const T*>(p_.x) + token * p_.x_stride;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        b[tile][i] = 0;
        if (token < p_.m && column + 8 * i < p_.x_columns) {
          // Not through the read-only path: the kernel before may have written x.
          asm volatile("ld.global.u32 %0, [%1];"
                       : "=r"(b[tile][i])
                       : "l"(row + column + 8 * i)
                       : "memory");
        }
      }
    }
  }

  __device__ __forceinline__ void multiply(int slot, const int4& steps) {
    uint32_t words[S::kStrips][S::kPieces * 4];
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
      for (int piece = 0; piece < S::kPieces; ++piece) {
        const uint4 q =
            ptx::load_shared_16(ring_ + slot * S::kStageBytes + (s * S::kPieces + piece) * 512);
        words[s][piece * 4] = q.x;
        words[s][piece * 4 + 1] = q.y;
        words[s][piece * 4 + 2] = q.z;
        words[s][piece * 4 + 3] = q.w;
      }
    }
    const int step_group[4] = {steps.x, steps.y, steps.z, steps.w};
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      if (step_group[step] != groups_.group()) {
        finish_group();
        take_group();
      }
#pragma unroll
      for (int s = 0; s < S::kStrips; ++s) {
        uint32_t a[4];
        decode(a, &words[s][step * S::kPieces], groups_.zero(s), T());
#pragma unroll
        for (int t = 0; t < S::kTokenTiles; ++t) {
          ptx::mma_m16n8k16<T>(part_[s][t], a, tokens_[t][2 * step], tokens_[t][2 * step + 1]);
        }
      }
    }
  }

  const GemmProblem& p_;
  const WeightView& w_;
  float* slots_;
  uint32_t ring_;
  int warp_, lane_, chunks_, strips_, first_strip_group_, strip_groups_, items_, run_, begin_, end_;
  int fill_group_, fill_chunk_, strip_group_, chunk_;
  int4 steps_;
  GroupStream<T, S::kBits, S::kStrips> groups_;
  uint32_t tokens_[S::kTokenTiles][8];
  uint32_t next_tokens_[S::kTokenTiles][8];
  float sum_[S::kStrips][S::kTokenTiles][4];
  float part_[S::kStrips][S::kTokenTiles][4];
};

template <class S>
__global__ void __launch_bounds__(S::kWarps * 32)
    strip_gemm(const __grid_constant__ GemmProblem problem) {
  extern __shared__ __align__(128) unsigned char shared[];
  StripLoop<S> loop(problem, shared, reinterpret_cast<float*>(shared + S::kRingBytes));
  loop.run();
  __syncthreads();
  loop.store_output_tile();
}

}  // namespace marlinq::cuda::sm80
