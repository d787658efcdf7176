// What the wgmma kernels of products and of products over experts have in common: how a tile lies in
// registers and in shared memory.
#pragma once

#include <cstdint>

#include "cuda/arch/sm80/layout.hpp"
#include "cuda/arch/sm80/x_tile.cuh"
#include "cuda/arch/sm90/tile_plan.hpp"
#include "cuda/problem.hpp"
#include "cuda/ptx/copy.cuh"

namespace marlinq::cuda::sm90 {

/// Warpgroups that multiply, each with its packed blocks of 64 features, all with the same tokens; one more
/// fills the ring.
template <class T_, int kBits_, int kGroups_, int kGroupBlocks_, int kTokens_,
          int kStageChunks_ = kSlabChunks>
struct WgmmaShape {
  using T = T_;
  using Layout = sm80::Layout;
  static constexpr int kBits = kBits_;
  static constexpr int kGroupBlocks = kGroupBlocks_;  // packed blocks of a warpgroup
  static constexpr int kTokens = kTokens_;
  static constexpr int kGroups = kGroups_;  // warpgroups that multiply
  static constexpr int kBlocks = kGroups * kGroupBlocks;
  static constexpr int kFeatures = kBlocks * Layout::kBlockFeatures;
  static constexpr int kMultiplyThreads = kGroups * 128;
  static constexpr int kThreads = kMultiplyThreads + 128;
  static constexpr int kStageChunks = kStageChunks_;  // a slab's, or 1
  static constexpr int kStripBytes = 128 * kBits;     // codes of a strip and chunk
  static constexpr int kChunkBytes = Layout::kBlockStrips * kStripBytes;
  static constexpr int kBlockStageBytes =
      kStageChunks * kChunkBytes;  // codes of a packed block in a stage
  static constexpr int kXTileBytes = kTokens * sm80::kXRowBytes;  // of a chunk
  static constexpr int kXBytes = kStageChunks * kXTileBytes;
  static constexpr int kStageBytes = kXBytes + kBlocks * kBlockStageBytes;  // without records
  static constexpr int kSums = kTokens / 2;  // of a thread and packed block
  static constexpr int kTileFloats = kFeatures * kTokens;
  // Registers move from the warpgroup that fills to the others.
  static constexpr int kFillRegisters = 40;
  static constexpr int kMultiplyRegisters = kGroups == 2 ? 232 : 152;
};

/// Zeros in shared memory, four bytes at a time, by the threads that fill.
template <class S>
__device__ __forceinline__ void clear_by_fillers(uint32_t begin, uint32_t end) {
  for (uint32_t place = begin + (threadIdx.x - S::kMultiplyThreads) * 4; place < end;
       place += (S::kThreads - S::kMultiplyThreads) * 4) {
    ptx::store_shared_4(place, 0);
  }
}

/// Where a block leaves its part of a tile for another, each thread its sums, four at a time.
template <class S>
__device__ __forceinline__ float4* part_place(const SplitScratch& scratch, int block) {
  return reinterpret_cast<float4*>(scratch.partials) +
         static_cast<int64_t>(block) * (S::kTileFloats / 4) + threadIdx.x;
}

template <class S>
__device__ __forceinline__ void leave_sums(float4* place,
                                           const float (&sum)[S::kGroupBlocks][S::kSums]) {
#pragma unroll
  for (int b = 0; b < S::kGroupBlocks; ++b) {
#pragma unroll
    for (int i = 0; i < S::kSums / 4; ++i) {
      __stcg(place + (b * (S::kSums / 4) + i) * S::kMultiplyThreads,
             make_float4(sum[b][4 * i], sum[b][4 * i + 1], sum[b][4 * i + 2], sum[b][4 * i + 3]));
    }
  }
}

}  // namespace marlinq::cuda::sm90
