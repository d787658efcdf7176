// The dense product of the sm_80 family for few tokens: bound by the stream of codes, so nothing
// else may wait.
//
// A block owns whole strips, in strip groups of up to 4. Its items (strip group, chunk of 64 packed
// rows) are one sequence; each warp takes a contiguous run of it, of equal cost, and streams codes,
// group records and its rows of x through a ring of its own: no barrier in the loop. At the end of a
// strip group or of its run a warp leaves its sums in shared memory; at the end of the block they
// are added in the order of the warps, so nothing depends on timing.
//
// Weights do not depend on the kernel before: they are asked for before the wait for it.
//
// Bytes in flight: 4.65 TB/s over 132 multiprocessors and about 1 us of latency is 35 KB each;
// 8 warps with 3 stages ahead of 2 KB have 48.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/arch/sm80/group_values.cuh"
#include "cuda/arch/sm80/layout.hpp"
#include "cuda/arch/sm80/output.cuh"
#include "cuda/arch/sm80/share.hpp"
#include "cuda/arch/sm80/x_tile.cuh"
#include "cuda/device/dequantize.cuh"
#include "cuda/problem.hpp"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/launch.cuh"
#include "cuda/ptx/mma.cuh"

namespace marlinq::cuda::sm80 {

constexpr int kMaxStripWarps = 16;

template <class T_, int kBits_, int kTokenTiles_, int kMaxWarps_>
struct StripShape {
  using T = T_;
  static constexpr int kBits = kBits_;
  static constexpr int kTokenTiles = kTokenTiles_;
  static constexpr int kTokens = kTokenTiles * 8;
  static constexpr int kMaxWarps = kMaxWarps_;
  static constexpr int kStrips = Layout::kBlockStrips;
  static constexpr int kPieces = kBits / 4;
  static constexpr int kStripBytes = kPieces * 512;  // codes of a strip and chunk
  static constexpr int kXBytes = kTokens * kXRowBytes;
  // Sums of a warp for a strip group, [token][feature]: the 4 floats between tokens put the 32 lanes
  // of a store into 32 banks.
  static constexpr int kSlotRow = kStrips * 16 + 4;
  static constexpr int kSlotFloats = kTokens * kSlotRow;
};

struct StripParams {
  GemmProblem problem;
  EvenShare strips;  // over the blocks
  int stages;
  int stage_bytes;
  int width;  // strips of the widest strip group, which a stage holds
};

/// How the strips of a block make strip groups, and their items are divided among its warps.
class StripShare {
 public:
  __device__ __forceinline__ StripShare(int block_strips, int chunks, int warps)
      : strips_(block_strips, (block_strips + Layout::kBlockStrips - 1) / Layout::kBlockStrips),
        costs_(block_strips * chunks, warps),
        chunks_(chunks) {}

  __device__ __forceinline__ int strips() const { return strips_.total; }
  __device__ __forceinline__ int groups() const { return strips_.parts; }
  __device__ __forceinline__ int warps() const { return costs_.parts; }
  __device__ __forceinline__ int first_strip(int group) const { return strips_.begin(group); }
  __device__ __forceinline__ int width(int group) const { return strips_.size(group); }
  __device__ __forceinline__ int group_of(int strip) const { return strips_.part_of(strip); }

  /// First chunk of a strip group that belongs to `warp` or a later one. An item costs its width,
  /// warps share the whole.
  __device__ __forceinline__ int first_chunk(int group, int warp) const {
    const int rest = costs_.begin(warp) - first_strip(group) * chunks_;
    const int w = width(group);
    return rest <= 0 ? 0 : min((rest + w - 1) / w, chunks_);
  }

 private:
  EvenShare strips_;  // over the strip groups
  EvenShare costs_;   // over the warps
  int chunks_;
};

/// A position in the items of a warp.
struct StripPosition {
  int group = -1;
  int chunk = 0;
  int end = 0;  // of the warp's chunks in this group

  /// Moves to the next item; false after the last.
  __device__ __forceinline__ bool advance(const StripShare& share, int warp) {
    if (++chunk < end) return true;
    do {
      if (++group >= share.groups()) return false;
      chunk = share.first_chunk(group, warp);
      end = share.first_chunk(group, warp + 1);
    } while (chunk >= end);
    return true;
  }
};

template <class S>
class StripLoop {
 public:
  using T = typename S::T;

  __device__ __forceinline__ StripLoop(const StripParams& params, const StripShare& share,
                                       int first_strip, unsigned char* shared, float* slots)
      : params_(params),
        p_(params.problem),
        w_(params.problem.weight),
        share_(share),
        first_strip_(first_strip),
        slots_(slots) {
    warp_ = threadIdx.x / 32;
    lane_ = threadIdx.x % 32;
    ring_ = ptx::shared_address(shared) + warp_ * params.stages * params.stage_bytes;
    last_block_ = (w_.n + Layout::kBlockFeatures - 1) / Layout::kBlockFeatures - 1;
    last_block_strips_ = (w_.n + 15) / 16 - last_block_ * Layout::kBlockStrips;
    record_pieces_ = w_.record_bytes / 16;
    record_strip_ = lane_ / record_pieces_;
    record_piece_ = lane_ % record_pieces_;
  }

  __device__ __forceinline__ void run() {
    const int ahead = params_.stages - 1;
    clear_x();
    StripPosition fill;
    bool filling = fill.advance(share_, warp_);
    StripPosition item = fill;
    const bool any = filling;
    StripPosition x_fill = fill;
    if (any) {
      item_groups_ = load_chunk_groups(w_, item.chunk);
      fill_groups_ = item_groups_;
    }
    for (int stage = 0; stage < ahead && filling; ++stage) {
      fill_weights(stage, fill);
      filling = advance_fill(fill);
    }
    ptx::wait_for_predecessor();
    bool x_filling = any;
    for (int stage = 0; stage < ahead; ++stage) {
      if (x_filling) {
        fill_x(stage, x_fill);
        x_filling = x_fill.advance(share_, warp_);
      }
      ptx::copy_commit();
    }
    if (!filling && warp_ == 0) ptx::launch_dependents();
    if (!any) return;
    clear_sums();
    values_.set_middle(w_);
    quant_group_ = -1;
    int stage = 0;
    bool more = true;
    while (more) {
      ptx::copy_wait(ahead - 1);
      __syncwarp();
      // The slot of the item before is free: all lanes have read it.
      if (filling) {
        const int slot = stage == 0 ? ahead : stage - 1;
        fill_weights(slot, fill);
        fill_x(slot, fill);
        filling = advance_fill(fill);
        if (!filling && warp_ == 0) ptx::launch_dependents();
      }
      ptx::copy_commit();
      const StripPosition current = item;
      const ChunkGroups groups = item_groups_;
      more = item.advance(share_, warp_);
      if (more) item_groups_ = load_chunk_groups(w_, item.chunk);
      const uint32_t at = ring_ + stage * params_.stage_bytes;
      switch (share_.width(current.group)) {
        case 1:
          multiply<1>(at, groups);
          break;
        case 2:
          multiply<2>(at, groups);
          break;
        case 3:
          multiply<3>(at, groups);
          break;
        default:
          multiply<4>(at, groups);
      }
      if (!more || item.group != current.group) {
        finish_group<S::kStrips>();
        store_sums(current.group);
        quant_group_ = -1;
      }
      stage = stage == ahead ? 0 : stage + 1;
    }
  }

  /// Which warps have items of each strip group, a bit each. Before a block barrier.
  __device__ __forceinline__ static void list_contributors(const StripShare& share,
                                                           uint32_t* contributors) {
    for (int group = threadIdx.x; group < share.groups(); group += blockDim.x) {
      uint32_t warps = 0;
      for (int warp = 0; warp < share.warps(); ++warp) {
        if (share.first_chunk(group, warp) < share.first_chunk(group, warp + 1)) warps |= 1u << warp;
      }
      contributors[group] = warps;
    }
  }

  /// Adds what the warps left, in their order, and writes the output. After a block barrier.
  __device__ __forceinline__ void store_tile(const uint32_t* contributors) const {
    const int features = share_.strips() * 16;
    for (int i = threadIdx.x; i < features * p_.m; i += blockDim.x) {
      const int token = i / features;
      const int place = i % features;
      const int feature = first_strip_ * 16 + place;
      if (feature >= w_.n) continue;
      const int group = share_.group_of(place / 16);
      const int in_group = place - share_.first_strip(group) * 16;
      float value = 0.0f;
      for (uint32_t warps = contributors[group]; warps != 0; warps &= warps - 1) {
        const int warp = __ffs(warps) - 1;
        value += slots_[(group + warp) * S::kSlotFloats + token * S::kSlotRow + in_group];
      }
      store_output(p_, token, feature, value);
    }
  }

 private:
  __device__ __forceinline__ bool advance_fill(StripPosition& fill) {
    if (!fill.advance(share_, warp_)) return false;
    fill_groups_ = load_chunk_groups(w_, fill.chunk);
    return true;
  }

  __device__ __forceinline__ uint32_t records(uint32_t stage) const {
    return stage + S::kXBytes + params_.width * S::kStripBytes;
  }

  __device__ __forceinline__ void fill_weights(int slot, const StripPosition& at) {
    const uint32_t stage = ring_ + slot * params_.stage_bytes;
    const int first = first_strip_ + share_.first_strip(at.group);
    const int width = share_.width(at.group);
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
      if (s < width) {
        const int block = (first + s) / Layout::kBlockStrips;
        const int block_strips = block == last_block_ ? last_block_strips_ : Layout::kBlockStrips;
        const int64_t strip_chunk =
            static_cast<int64_t>(block) * Layout::kBlockStrips * w_.chunks +
            static_cast<int64_t>(at.chunk) * block_strips + (first + s) % Layout::kBlockStrips;
        const uint32_t* source = w_.codes + strip_chunk * (S::kStripBytes / 4) + lane_ * 4;
        const uint32_t target = stage + S::kXBytes + s * S::kStripBytes + lane_ * 16;
#pragma unroll
        for (int piece = 0; piece < S::kPieces; ++piece) {
          ptx::copy_async(target + piece * 512, source + piece * 128);
        }
      }
    }
    if (record_strip_ < width) {
      const int strip = first + record_strip_;
      const unsigned char* source =
          w_.groups +
          ((static_cast<int64_t>(strip / Layout::kBlockStrips) * w_.num_groups +
            fill_groups_.first()) *
               Layout::kBlockStrips +
           strip % Layout::kBlockStrips) *
              w_.record_bytes +
          record_piece_ * 16;
      uint32_t target = records(stage) + record_strip_ * w_.record_bytes + record_piece_ * 16;
      for (int group = 0; group < fill_groups_.count(); ++group) {
        ptx::copy_async(target, source);
        source += Layout::kBlockStrips * w_.record_bytes;
        target += params_.width * w_.record_bytes;
      }
    }
  }

  // Rows of x beyond m stay 0 in every slot.
  __device__ __forceinline__ void clear_x() const {
    for (int stage = 0; stage < params_.stages; ++stage) {
      for (int piece = p_.m * 8 + lane_; piece < S::kTokens * 8; piece += 32) {
        ptx::store_shared_16(ring_ + stage * params_.stage_bytes + piece * 16,
                             make_uint4(0, 0, 0, 0));
      }
    }
  }

  __device__ __forceinline__ void fill_x(int slot, const StripPosition& at) const {
    const uint32_t stage = ring_ + slot * params_.stage_bytes;
    const int column = at.chunk * Layout::kChunkRows + lane_ % 8 * 8;
    const int bytes = x_piece_bytes(p_, column);
    const T* source = static_cast<const T*>(p_.x);
#pragma unroll
    for (int i = 0; i < S::kTokens / 4; ++i) {
      const int token = i * 4 + lane_ / 8;
      if (token < p_.m) {
        ptx::copy_async_zfill(stage + x_piece_place(token, lane_ % 8),
                              bytes > 0 ? source + token * p_.x_stride + column : source, bytes);
      }
    }
  }

  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
      values_.scale[s][0] = values_.scale[s][1] = 0.0f;
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum_[s][t][i] = part_[s][t][i] = 0.0f;
      }
    }
  }

  template <int kWidth>
  __device__ __forceinline__ void finish_group() {
#pragma unroll
    for (int s = 0; s < kWidth; ++s) {
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum_[s][t][i] = __fmaf_rn(values_.scale[s][i / 2], part_[s][t][i], sum_[s][t][i]);
          part_[s][t][i] = 0.0f;
        }
      }
    }
  }

  __device__ __forceinline__ void store_sums(int group) {
    float* slot = slots_ + (group + warp_) * S::kSlotFloats;
    const int width = share_.width(group);
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
        const int feature = s * 16 + lane_ / 4;
        const int token = t * 8 + 2 * (lane_ % 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (s < width) slot[(token + i % 2) * S::kSlotRow + feature + 8 * (i / 2)] = sum_[s][t][i];
          sum_[s][t][i] = 0.0f;
        }
      }
    }
  }

  // One item: groups that start inside the chunk are rare, and cost code of their own.
  template <int kWidth>
  __device__ __forceinline__ void multiply(uint32_t stage, const ChunkGroups& groups) {
    if (groups.first() != quant_group_) {
      finish_group<kWidth>();
      values_.template load<kWidth>(records(stage), w_);
    }
    quant_group_ = groups.last();
    if (groups.changes()) {
      multiply_steps<kWidth, true>(stage, groups);
    } else {
      multiply_steps<kWidth, false>(stage, groups);
    }
  }

  template <int kWidth, bool kChanges>
  __device__ __forceinline__ void multiply_steps(uint32_t stage, const ChunkGroups& groups) {
    constexpr int kPieceSteps = Layout::kChunkSteps / S::kPieces;
    const uint32_t codes = stage + S::kXBytes + lane_ * 16;
    uint32_t group_records = records(stage);
#pragma unroll
    for (int piece = 0; piece < S::kPieces; ++piece) {
      uint32_t words[kWidth][4];
#pragma unroll
      for (int s = 0; s < kWidth; ++s) {
        const uint4 q = ptx::load_shared_16(codes + s * S::kStripBytes + piece * 512);
        words[s][0] = q.x;
        words[s][1] = q.y;
        words[s][2] = q.z;
        words[s][3] = q.w;
      }
#pragma unroll
      for (int i = 0; i < kPieceSteps; ++i) {
        const int step = piece * kPieceSteps + i;
        if (kChanges && step > 0 && groups.starts(step)) {
          finish_group<kWidth>();
          group_records += params_.width * w_.record_bytes;
          values_.template load<kWidth>(group_records, w_);
        }
        // Two steps of a tile of 8 tokens are one ldmatrix.
        if (step % 2 == 0) {
#pragma unroll
          for (int t = 0; t < S::kTokenTiles; ++t) {
            ptx::ldmatrix_x4(x_[t], stage + x_piece_place(t * 8 + lane_ % 8, step * 2 + lane_ / 8));
          }
        }
#pragma unroll
        for (int s = 0; s < kWidth; ++s) {
          uint32_t a[4];
          decode(a, &words[s][i * S::kPieces], values_.zero[s], T());
#pragma unroll
          for (int t = 0; t < S::kTokenTiles; ++t) {
            ptx::mma_m16n8k16<T>(part_[s][t], a, x_[t][step % 2 * 2], x_[t][step % 2 * 2 + 1]);
          }
        }
      }
    }
  }

  const StripParams& params_;
  const GemmProblem& p_;
  const WeightView& w_;
  const StripShare& share_;
  int first_strip_;
  float* slots_;
  uint32_t ring_;
  int warp_, lane_, last_block_, last_block_strips_;
  int record_pieces_, record_strip_, record_piece_;
  int quant_group_;
  ChunkGroups item_groups_, fill_groups_;
  GroupValues<T, S::kBits, S::kStrips> values_;
  uint32_t x_[S::kTokenTiles][4];
  float sum_[S::kStrips][S::kTokenTiles][4];
  float part_[S::kStrips][S::kTokenTiles][4];
};

template <class S>
__global__ void __launch_bounds__(S::kMaxWarps * 32)
    strip_gemm(const __grid_constant__ StripParams params) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int first = params.strips.begin(blockIdx.x);
  const int warps = blockDim.x / 32;
  const StripShare share(params.strips.size(blockIdx.x), params.problem.weight.chunks, warps);
  auto* slots =
      reinterpret_cast<float*>(shared + warps * params.stages * params.stage_bytes);
  auto* contributors =
      reinterpret_cast<uint32_t*>(slots + (share.groups() + warps - 1) * S::kSlotFloats);
  StripLoop<S>::list_contributors(share, contributors);
  StripLoop<S> loop(params, share, first, shared, slots);
  loop.run();
  __syncthreads();
  loop.store_tile(contributors);
}

}  // namespace marlinq::cuda::sm80
