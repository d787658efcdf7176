// The dense product of sm90 for many tokens: wgmma with the weights in registers.
//
// A block has a tile of features x tokens: warpgroups that multiply, each with one or two packed blocks of
// 64 features, and warps that fill a ring with x (boxes of the tensor map), codes and group records, a slab
// of two chunks a stage, or a chunk where tokens are so many that a slab would leave room for two stages only.
// A warpgroup decodes the next codes while its products run. There is one set of
// sums, in units of the scale of the current group: when a group begins they are multiplied by the
// quotient of the old scale and the new one. Where a slab has several groups, codes are multiplied by scales
// instead (code_scales.cuh), unless tokens are few.
//
// Blocks may work in pairs, clusters whose tiles have the same tokens and neighbouring features: each asks
// for half of x, for both. A pair then counts as one block where tiles are shared out. Or in pairs that have
// neighbouring parts of one tile: each block gets the sums of one warpgroup from the other, through its shared memory,
// and has half of the features of what both have.
//
// Tiles are shared among the blocks as TileSchedule says. A tile that is cut belongs to the block with its
// last chunks; the others leave their sums in global memory and raise a flag. Where all tiles are cut, a
// block waits for its sums to have been read before it leaves those of another tile.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/arch/sm80/code_scales.cuh"
#include "cuda/arch/sm80/group_values.cuh"
#include "cuda/arch/sm80/layout.hpp"
#include "cuda/arch/sm80/output.cuh"
#include "cuda/arch/sm80/share.hpp"
#include "cuda/arch/sm80/x_tile.cuh"
#include "cuda/arch/sm90/step_codes.cuh"
#include "cuda/arch/sm90/tile_plan.hpp"
#include "cuda/arch/sm90/tile_shape.cuh"
#include "cuda/device/dequantize.cuh"
#include "cuda/problem.hpp"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/flag.cuh"
#include "cuda/ptx/launch.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/store.cuh"
#include "cuda/ptx/warp.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tensor_map.hpp"

namespace marlinq::cuda::sm90 {

using sm80::CodeScales;
using sm80::Divider;
using sm80::EvenShare;
using sm80::GroupValues;
using sm80::Layout;
using sm80::TileCuts;

template <class T, int kBits, int kGroups, int kGroupBlocks, int kTokens, int kClusterBlocks_>
struct TileShape
    : WgmmaShape<T, kBits, kGroups, kGroupBlocks, kTokens, kTokens <= 128 ? kSlabChunks : 1> {
  static constexpr int chunk_of_stage(int chunk) { return chunk % TileShape::kStageChunks; }
  static constexpr int kBoxTokens = kTokens / kClusterBlocks_;  // of x, that a block asks for
  static constexpr int kClusterBlocks = kClusterBlocks_;        // 1 or 2
  static constexpr int kOutputTokens = kTokens % 64 == 0 ? 64 : kTokens;  // of a box
  static constexpr int kBoxBytes = kOutputTokens * Layout::kBlockFeatures * 2;
  static constexpr int kGroupOutputBytes = kGroupBlocks * (kTokens / kOutputTokens) * kBoxBytes;
  static constexpr int kOutputBytes = kGroups * kGroupOutputBytes;
  static constexpr bool kMayShareTile = kGroups == 2 && kClusterBlocks == 1;
  // What comes from the other block of a pair has the place of outputs.
  static constexpr int kHalfTileBytes = TileShape::kTileFloats / 2 * 4;
  static_assert(!kMayShareTile || kHalfTileBytes <= kOutputBytes);
  // Parts of a tile that a thread reads at a time.
  static constexpr int kThreadSums = kGroupBlocks * kTokens / 2;
  static constexpr int kPartsTogether = kThreadSums <= 32 ? 3 : kThreadSums <= 64 ? 2 : 1;
};

struct TileParams {
  TensorMap x_map;  // boxes of a token tile, or of the rows of x if these are fewer
  TensorMap y_map;  // where outputs are stored in boxes
  GemmProblem problem;
  SplitScratch scratch;
  TileSchedule schedule;
  TileCuts tail;
  // Where every tile is cut: all the parts, those of a tile, and their slabs.
  int all_parts;
  Divider parts;
  EvenShare part_slabs;
  int token_tiles;
  Divider band;            // by the tiles of a band of token tiles
  Divider band_widths[2];  // by the token tiles of a band; of the last band
  int stages;
  int x_box_bytes;   // of a chunk
  int slabs;         // along K
  int slab_groups;   // groups of a slab, 1, 2 or 4
  int stage_groups;  // of a stage
  int group_slabs;   // slabs of a group, a power of two
  bool boxes;        // outputs are of type T, and may be stored 16 bytes at a time
};

/// The number of this block, or of its pair, and its place in that.
template <class S>
__device__ __forceinline__ int unit() {
  return blockIdx.x / S::kClusterBlocks;
}
template <class S>
__device__ __forceinline__ int rank_in_unit() {
  return blockIdx.x % S::kClusterBlocks;
}

/// A part of a tile: slabs begin to end - 1.
struct TilePart {
  int feature_tile;
  int token_tile;
  int tail_tile;
  int begin;
  int end;
};

template <class S>
class TileWalk {
 public:
  __device__ __forceinline__ explicit TileWalk(const TileParams& params)
      : params_(params), slabs_(params.slabs) {}

  /// The parts of this block, one after the other: the tail from its last tile to its first.
  __device__ __forceinline__ bool next(TilePart& part) {
    const TileSchedule& schedule = params_.schedule;
    const int units = gridDim.x / S::kClusterBlocks;
    int tile = step_ * units + unit<S>();
    if (schedule.parts > 0) {
      if (tile >= params_.all_parts) return false;
      ++step_;
      const int number = tile;
      tile = params_.parts.divide(number);
      part.begin = params_.part_slabs.begin(number - tile * schedule.parts);
      part.end = params_.part_slabs.begin(number - tile * schedule.parts + 1);
      find(tile, part);
      return true;
    }
    part.begin = 0;
    part.end = slabs_;
    if (step_ >= schedule.whole_tiles) {
      if (unit<S>() >= schedule.tail_blocks) return false;
      const int first = params_.tail.begin(unit<S>());
      const int last = params_.tail.begin(unit<S>() + 1);
      if (step_ == schedule.whole_tiles) tail_tile_ = static_cast<unsigned>(last - 1) / slabs_;
      part.tail_tile = tail_tile_--;
      const int tile_first = part.tail_tile * slabs_;
      if (part.tail_tile < 0 || tile_first + slabs_ <= first) return false;
      tile = schedule.whole_tiles * units + part.tail_tile;
      part.begin = max(first - tile_first, 0);
      part.end = min(last - tile_first, slabs_);
    }
    ++step_;
    find(tile, part);
    return true;
  }

 private:
  __device__ __forceinline__ void find(int tile, TilePart& part) const {
    const int token_band = params_.schedule.token_band;
    const int band = params_.band.divide(tile);
    const int band_first = band * token_band;
    const int left = params_.token_tiles - band_first;
    const int within = tile - band * params_.band.divisor;
    const bool whole = left >= token_band;
    const int features = params_.band_widths[whole ? 0 : 1].divide(within);
    part.feature_tile = features * S::kClusterBlocks + rank_in_unit<S>();
    part.token_tile = band_first + within - features * (whole ? token_band : left);
  }

  const TileParams& params_;
  int slabs_;
  int step_ = 0;
  int tail_tile_ = 0;
};

/// What the filling and the multiplying warps share.
template <class S>
class TileRing {
 public:
  __device__ __forceinline__ TileRing(const TileParams& params, unsigned char* shared)
      : stages_(params.stages),
        record_bytes_(Layout::kBlockStrips * params.problem.weight.record_bytes),
        stage_record_bytes_(params.stage_groups * record_bytes_) {
    ring_ = ptx::shared_address(shared);
    output_ = ring_ + stages_ * S::kStageBytes;
    records_ = output_ + S::kOutputBytes;
    barriers_ = records_ + stages_ * S::kBlocks * stage_record_bytes_;
  }

  __device__ __forceinline__ uint32_t x() const { return ring_ + stage_ * S::kStageBytes; }
  __device__ __forceinline__ uint32_t codes(int block) const {
    return x() + S::kXBytes + block * S::kBlockStageBytes;
  }
  __device__ __forceinline__ uint32_t records(int block) const {
    return records_ + (stage_ * S::kBlocks + block) * stage_record_bytes_;
  }
  __device__ __forceinline__ uint32_t output() const { return output_; }
  __device__ __forceinline__ int record_bytes() const { return record_bytes_; }
  __device__ __forceinline__ int stage_record_bytes() const { return stage_record_bytes_; }
  __device__ __forceinline__ uint32_t filled(int stage) const { return barriers_ + stage * 8; }
  __device__ __forceinline__ uint32_t emptied(int stage) const {
    return barriers_ + (stages_ + stage) * 8;
  }
  __device__ __forceinline__ uint32_t x_filled(int stage) const {
    return barriers_ + (2 * stages_ + stage) * 8;
  }
  /// Completes when the sums of the other block of a pair are there.
  __device__ __forceinline__ uint32_t received() const { return barriers_ + 3 * stages_ * 8; }

  /// By the threads that fill. What a last slab has no group for is multiplied by what lies there, and meets zeros.
  __device__ __forceinline__ void clear_records() const {
    clear_by_fillers<S>(records_, barriers_);
    ptx::fence_for_async_reads();
  }

  __device__ __forceinline__ int stage() const { return stage_; }
  __device__ __forceinline__ int stages() const { return stages_; }
  __device__ __forceinline__ uint32_t parity() const { return parity_; }
  __device__ __forceinline__ void advance() {
    if (++stage_ == stages_) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

 private:
  uint32_t ring_, output_, records_, barriers_;
  int stages_, record_bytes_, stage_record_bytes_;
  int stage_ = 0;
  uint32_t parity_ = 0;
};

/// What a warp brings into the ring. Each has few instructions for a chunk, one after the other: a warp
/// that did it all would be slower than the products of few tokens.
enum class FillRole { kCodes, kRecords, kX };

/// By one warp: fills its part of the ring. A lane copies for one packed block.
template <class S, FillRole kRole>
class TileFill {
 public:
  __device__ __forceinline__ TileFill(const TileParams& params, const TileRing<S>& ring)
      : params_(params), w_(params.problem.weight), ring_(ring) {
    lane_ = threadIdx.x % 32;
  }

  // Weights do not depend on the kernel before.
  __device__ __forceinline__ void run() {
    const uint64_t policy = ptx::evict_first_policy();
    if (kRole == FillRole::kX && lane_ == 0) ptx::prefetch_tensor_map(params_.x_map);
    TileWalk<S> walk(params_);
    TilePart part;
    bool more = walk.next(part);
    if (kRole == FillRole::kX) ptx::wait_for_predecessor();
    for (; more; more = walk.next(part)) {
      // Past the last block of features, which nobody stores, that is read again.
      const int last = (w_.n + Layout::kBlockFeatures - 1) / Layout::kBlockFeatures - 1;
      const int64_t block = min(part.feature_tile * S::kBlocks + lane_, last);
      const unsigned char* codes = reinterpret_cast<const unsigned char*>(w_.codes) +
                                   (block * w_.chunks + part.begin * kSlabChunks) * S::kChunkBytes;
      const unsigned char* groups = w_.groups + block * w_.num_groups * ring_.record_bytes();
#pragma unroll 1
      for (int chunk = part.begin * kSlabChunks; chunk < part.end * kSlabChunks;
           chunk += S::kStageChunks) {
        const uint32_t barrier =
            kRole == FillRole::kX ? ring_.x_filled(ring_.stage()) : ring_.filled(ring_.stage());
        // Also where there is nothing to copy: parity tells apart neighbouring phases only.
        ptx::barrier_wait(ring_.emptied(ring_.stage()), ring_.parity() ^ 1);
        if constexpr (kRole == FillRole::kCodes) {
          // Beside or after an odd last chunk are codes of before, which meet zeros.
          const int bytes = min(S::kStageChunks, w_.chunks - chunk) * S::kChunkBytes;
          if (lane_ < S::kBlocks) {
            ptx::barrier_expect(barrier, bytes);
            if (S::kStageChunks == kSlabChunks || bytes > 0) {
              if (params_.token_tiles > 1) {
                ptx::bulk_copy(ring_.codes(lane_), codes, bytes, barrier);
              } else {
                ptx::bulk_copy(ring_.codes(lane_), codes, bytes, barrier, policy);
              }
            }
          }
          codes += S::kBlockStageBytes;
        } else if constexpr (kRole == FillRole::kRecords) {
          if (lane_ < S::kBlocks) {
            const bool starts = chunk == part.begin * kSlabChunks || begins_group(chunk);
            const int bytes = starts ? record_bytes(chunk) : 0;
            ptx::barrier_expect(barrier, bytes);
            if (bytes > 0) {
              ptx::bulk_copy(ring_.records(lane_),
                             groups + static_cast<int64_t>(group(chunk)) * ring_.record_bytes(),
                             bytes, barrier);
            }
          }
        } else if constexpr (S::kClusterBlocks == 2) {
          // Its half of the tokens, for both; and both halves come.
          static_assert(S::kStageChunks == 1);
          if (lane_ == 0) {
            constexpr uint16_t kBothBlocks = 3;
            const int half = rank_in_unit<S>();
            ptx::barrier_expect(barrier, 2 * params_.x_box_bytes);
            ptx::tensor_copy_to_blocks(
                ring_.x() + half * (S::kXTileBytes / 2), params_.x_map, chunk * Layout::kChunkRows,
                part.token_tile * S::kTokens + half * S::kBoxTokens, barrier, kBothBlocks);
          }
        } else if (lane_ < S::kStageChunks) {
          ptx::barrier_expect(barrier, params_.x_box_bytes);
          ptx::tensor_copy(ring_.x() + lane_ * S::kXTileBytes, params_.x_map,
                           (chunk + lane_) * Layout::kChunkRows, part.token_tile * S::kTokens,
                           barrier);
        }
        ring_.advance();
      }
    }
    if (kRole == FillRole::kCodes) ptx::launch_dependents();
  }

 private:
  __device__ __forceinline__ int group(int chunk) const {
    return (chunk * Layout::kChunkSteps) >> w_.step_shift;
  }
  __device__ __forceinline__ bool begins_group(int chunk) const {
    return (chunk % kSlabChunks == 0 || params_.slab_groups > 1) &&
           (chunk / kSlabChunks & (params_.group_slabs - 1)) == 0;
  }
  // Of a stage that begins one. There may be none beside an odd last chunk.
  __device__ __forceinline__ int record_bytes(int chunk) const {
    return min(params_.stage_groups, w_.num_groups - group(chunk)) * ring_.record_bytes();
  }

  const TileParams& params_;
  const WeightView& w_;
  TileRing<S> ring_;
  int lane_;
};

/// By a warpgroup: multiplies.
template <class S>
class TileMultiply {
 public:
  using T = typename S::T;

  __device__ __forceinline__ TileMultiply(const TileParams& params, const TileRing<S>& ring)
      : params_(params), p_(params.problem), w_(params.problem.weight), ring_(ring) {
    group_ = threadIdx.x / 128;
    warp_ = threadIdx.x / 32 % 4;
    lane_ = threadIdx.x % 32;
    const int block = group_ * S::kGroupBlocks;
    x_operand_ = ptx::wgmma_operand_low(ring.x());
    codes_place_ = ring.codes(block) + warp_ * S::kStripBytes + lane_ * 16;
    records_place_ = ring.records(block) + warp_ * w_.record_bytes;
    scale_place_ = lane_ / 4 * 4;
    has_zeros_ = w_.has_zeros;
    // Not worked out anew for each slab.
    ptx::keep_in_place(codes_place_);
    ptx::keep_in_place(records_place_);
    ptx::keep_in_place(scale_place_);
  }

  __device__ __forceinline__ void run() {
    TileWalk<S> walk(params_);
    TilePart part;
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) {
      values_[b].set_middle(w_);
    }
    bool waited = false;
    while (walk.next(part)) {
      multiply(part);
      // Nothing is written before the kernel before has ended.
      if (!waited) ptx::wait_for_predecessor();
      waited = true;
      finish(part);
    }
    if (stores()) ptx::wait_for_stores_to_read();
  }

 private:
  // So few that every instruction of the loop counts: the operands of products are made by one addition each,
  // which costs others registers that they need.
  static constexpr bool kFewTokens = S::kTokens <= 48;
  using XOperand = std::conditional_t<kFewTokens, uint64_t, uint32_t>;

  __device__ __forceinline__ void multiply(const TilePart& part) {
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < S::kSums; ++i) sum_[b][i] = 0.0f;
      ptx::keep_in_place(sum_[b]);
    }
    const bool half_scales = w_.scale_type == FloatType::kF16;
    if constexpr (S::kStageChunks == 1) {
      if (params_.slab_groups == 4) {
        scale_codes_of_chunks<4>(part);
      } else if (params_.slab_groups == 2) {
        scale_codes_of_chunks<2>(part);
      } else {
        half_scales ? multiply_chunks<true>(part) : multiply_chunks<false>(part);
      }
    } else if (params_.slab_groups == 4) {
      multiply_units<4>(part, half_scales);
    } else if (params_.slab_groups == 2) {
      multiply_units<2>(part, half_scales);
    } else if (kFewTokens && half_scales && params_.group_slabs == 1) {
      multiply_slabs<1, true, true>(part);
    } else {
      half_scales ? multiply_slabs<1, true, false>(part) : multiply_slabs<1, false, false>(part);
    }
  }

  // Slabs of so many groups, of which most layers have all and scales of float16.
  template <int kUnits>
  __device__ __forceinline__ void multiply_units(const TilePart& part, bool half_scales) {
    if constexpr (kScalesSums<kUnits>) {
      // All kernels of a batch-invariant layer have to do the same.
      if (half_scales && w_.num_groups % kUnits == 0 && params_.schedule.parts == 0) {
        multiply_slabs<kUnits, true, true>(part);
        return;
      }
    }
    scale_codes_of_slabs<kUnits>(part);
  }

  // Sums of few tokens are fewer than codes, each of which bfloat16 takes two instructions for.
  template <int kUnits>
  static constexpr bool kScalesSums =
      std::is_same_v<T, __half> ? kFewTokens && S::kGroupBlocks == 2 && kUnits == 2
                                : kFewTokens || (S::kTokens <= 64 && kUnits == 2);

  // A unit is the rows of a slab that have one group. Its products are begun in batches: of a chunk where
  // the warpgroup has one packed block, else of a packed block; or of that in half a chunk. While those of a batch
  // run, the codes of the next are decoded.
  template <int kUnits_>
  struct Batches {
    static constexpr int kUnits = kUnits_;
    static constexpr int kCount =
        S::kGroupBlocks == 1 ? std::max(kSlabChunks, kUnits) : S::kGroupBlocks * kUnits;
    static constexpr int kOfUnit = kCount / kUnits;
    static constexpr int kSteps = S::kGroupBlocks * kSlabSteps / kCount;
    static constexpr int block(int i) { return S::kGroupBlocks == 1 ? 0 : i % S::kGroupBlocks; }
    static constexpr int step(int i) { return i / S::kGroupBlocks * kSteps; }  // the first
    static constexpr bool begins_unit(int i) { return i % kOfUnit == 0; }
  };

  template <class B, bool kHalfScales>
  __device__ __forceinline__ void decode_first() {
    ptx::barrier_wait(ring_.filled(stage_), parity_);
    load_codes<B>(0, stage_);
    load_scales<kHalfScales>(0, stage_);
    change_zeros(0, stage_, true);
    decode_batch<B>(0);
    set_scales();
    ptx::barrier_wait(ring_.x_filled(stage_), parity_);
  }

  // kEachUnit: each unit begins a group, so that there is little to ask; what comes after the last slab is its group
  // once more. Others have one unit a slab.
  template <int kUnits, bool kHalfScales, bool kEachUnit>
  __device__ __forceinline__ void multiply_slabs(const TilePart& part) {
    static_assert(kEachUnit || kUnits == 1);
    using B = Batches<kUnits>;
    const int stages = params_.stages;
    decode_first<B, kHalfScales>();
    int slab = part.begin;
#pragma unroll 1
    do {
      // After the last slab comes that slab once more, for nothing.
      const bool more = slab + 1 < part.end;
      const int after = stage_ + 1 < stages ? stage_ + 1 : 0;
      const uint32_t parity_after = parity_ ^ (after == 0 ? 1 : 0);
      const int next = more ? after : stage_;
      const XOperand x = x_operand();
#pragma unroll
      for (int i = 0; i < B::kCount; ++i) {
        if (B::begins_unit(i)) rescale();
        ptx::wgmma_fence();
        multiply_steps<B::kSteps>(B::block(i), B::step(i), x);
        ptx::wgmma_commit();
        const bool last = i + 1 == B::kCount;
        const int following = last ? 0 : i + 1;
        const int unit = following / B::kOfUnit;
        const int stage = last ? next : stage_;
        if (last) ptx::barrier_wait(ring_.filled(next), more ? parity_after : parity_);
        const bool starts = kEachUnit
                                ? kUnits == 1 || !last || more
                                : last && more && ((slab + 1) & (params_.group_slabs - 1)) == 0;
        load_codes<B>(following, stage);
        if (B::begins_unit(following)) {
          load_scales<kHalfScales>(unit, stage);
          change_zeros(unit, stage, starts);
        }
        // Its registers are free: in other units all products before have been waited for.
        if (kUnits == 1 && following == 0) ptx::wgmma_wait<1>();
        decode_batch<B>(following);
        if (B::begins_unit(following)) {
          change_scales(starts);
          // The wait for x also keeps the assembler from moving the decoding behind the one for products.
          ptx::barrier_wait(ring_.x_filled(stage), last && more ? parity_after : parity_);
          wait_for_products();
        }
      }
      give_back(stage_);
      stage_ = after;
      parity_ = parity_after;
    } while (++slab < part.end);
  }

  // The products of so many groups a slab, whose codes are multiplied by their scales.
  template <int kUnits>
  __device__ __forceinline__ void scale_codes_of_slabs(const TilePart& part) {
    using B = Batches<1>;
    const int stages = params_.stages;
    begin_scaled<B, kUnits>();
    int slab = part.begin;
#pragma unroll 1
    do {
      // After the last slab comes that slab once more, for nothing.
      const bool more = slab + 1 < part.end;
      const int after = stage_ + 1 < stages ? stage_ + 1 : 0;
      const uint32_t parity_after = parity_ ^ (after == 0 ? 1 : 0);
      const int next = more ? after : stage_;
      const uint32_t parity_next = more ? parity_after : parity_;
      const XOperand x = x_operand();
#pragma unroll
      for (int i = 0; i < B::kCount; ++i) {
        ptx::wgmma_fence();
        multiply_steps<B::kSteps>(B::block(i), B::step(i), x);
        ptx::wgmma_commit();
        const bool last = i + 1 == B::kCount;
        const int following = last ? 0 : i + 1;
        const int stage = last ? next : stage_;
        if (last) ptx::barrier_wait(ring_.filled(next), parity_next);
        load_codes<B>(following, stage);
        if (following == 0) ptx::wgmma_wait<1>();
        decode_scaled<B, kUnits>(following, stage);
        if (last) ptx::barrier_wait(ring_.x_filled(next), parity_next);
      }
      wait_for_products();
      give_back(stage_);
      stage_ = after;
      parity_ = parity_after;
    } while (++slab < part.end);
    end_scaled();
  }

  template <int kUnits>
  __device__ __forceinline__ void scale_codes_of_chunks(const TilePart& part) {
    using B = Batches<1>;
    begin_scaled<B, kUnits>();
    const int end = part.end * kSlabChunks;
    int number = part.begin * kSlabChunks;
#pragma unroll 1
    do {
#pragma unroll
      for (int chunk = 0; chunk < kSlabChunks; ++chunk) {
        const XOperand x = x_operand();
        ptx::wgmma_fence();
        multiply_steps<Layout::kChunkSteps>(0, chunk * Layout::kChunkSteps, x);
        ptx::wgmma_commit();
        // After the last chunk comes that chunk once more, for nothing.
        const bool more = ++number < end;
        const int done = stage_;
        const uint32_t parity_done = parity_;
        if (++stage_ == params_.stages) {
          stage_ = 0;
          parity_ ^= 1;
        }
        const int next = more ? stage_ : done;
        const uint32_t parity_next = more ? parity_ : parity_done;
        ptx::barrier_wait(ring_.filled(next), parity_next);
        const int following = kSlabChunks - 1 - chunk;
        load_codes<B>(following, next);
        decode_scaled<B, kUnits>(following, next);
        ptx::barrier_wait(ring_.x_filled(next), parity_next);
        wait_for_products();
        give_back(done);
      }
    } while (number < end);
    end_scaled();
  }

  template <class B, int kUnits>
  __device__ __forceinline__ void begin_scaled() {
    ptx::barrier_wait(ring_.filled(stage_), parity_);
    load_codes<B>(0, stage_);
    decode_scaled<B, kUnits>(0, stage_);
    ptx::barrier_wait(ring_.x_filled(stage_), parity_);
  }
  __device__ __forceinline__ void end_scaled() {
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) sm80::set_scaled_units(values_[b]);
  }

  template <class B, int kUnits>
  __device__ __forceinline__ void decode_scaled(int i, int stage) {
    constexpr int kUnitSteps = kSlabSteps / kUnits;
    constexpr int kOfBatch = B::kSteps / kUnitSteps;
    constexpr int kOfStage = kUnits * S::kStageChunks / kSlabChunks;
    const int b = B::block(i);
    const int first = B::step(i) / kUnitSteps % kOfStage;
    CodeScales<T, S::kBits> scales[kOfBatch];
#pragma unroll
    for (int u = 0; u < kOfBatch; ++u) {
      scales[u].load(records(b, first + u, stage), w_.scale_type);
    }
#pragma unroll
    for (int u = 0; u < kOfBatch; ++u) {
      if (has_zeros_) values_[b].load_zeros(records(b, first + u, stage), w_);
#pragma unroll
      for (int step = u * kUnitSteps; step < (u + 1) * kUnitSteps; ++step) {
        auto& fragment = fragment_[b][B::step(i) + step];
        decode(fragment, &words_[step * kStepWords], values_[b].zero[0], T());
        scales[u].apply(fragment);
        ptx::keep_in_place(fragment);
      }
    }
  }

  // Where a stage holds a chunk. The products of a chunk are done before those of the next begin: the other
  // warpgroup has the tensor cores meanwhile, and the stage is given back.
  template <bool kHalfScales>
  __device__ __forceinline__ void multiply_chunks(const TilePart& part) {
    using B = Batches<1>;
    decode_first<B, kHalfScales>();
    int slab = part.begin;
    bool starts = false;
#pragma unroll 1
    do {
#pragma unroll
      for (int chunk = 0; chunk < kSlabChunks; ++chunk) {
        if (chunk == 0 && starts) rescale();
        const XOperand x = x_operand();
        ptx::wgmma_fence();
        multiply_steps<Layout::kChunkSteps>(0, chunk * Layout::kChunkSteps, x);
        ptx::wgmma_commit();
        // After the last chunk comes that chunk once more, for nothing.
        const bool last = chunk + 1 == kSlabChunks;
        const bool more = !last || slab + 1 < part.end;
        const int done = stage_;
        const uint32_t parity_done = parity_;
        if (++stage_ == params_.stages) {
          stage_ = 0;
          parity_ ^= 1;
        }
        const int next = more ? stage_ : done;
        const uint32_t parity_next = more ? parity_ : parity_done;
        ptx::barrier_wait(ring_.filled(next), parity_next);
        const int following = last ? 0 : chunk + 1;
        load_codes<B>(following, next);
        starts = last && more && ((slab + 1) & (params_.group_slabs - 1)) == 0;
        if (starts) load_scales<kHalfScales>(0, next);
        change_zeros(0, next, starts);
        decode_batch<B>(following);
        if (starts) change_scales(true);
        ptx::barrier_wait(ring_.x_filled(next), parity_next);
        wait_for_products();
        give_back(done);
      }
    } while (++slab < part.end);
  }

  // A stage to those who fill it.
  __device__ __forceinline__ void give_back(int stage) const {
    __syncwarp();  // all lanes have read the codes
    if constexpr (S::kClusterBlocks == 2) {
      if (lane_ < 2)
        ptx::barrier_arrive_in_block(ptx::address_in_block(ring_.emptied(stage), lane_));
    } else {
      if (lane_ == 0) ptx::barrier_arrive(ring_.emptied(stage));
    }
  }

  __device__ __forceinline__ XOperand x_operand() const {
    return whole_operand(ptx::same_in_warp(x_operand_ + stage_ * (S::kStageBytes / 16)));
  }
  __device__ __forceinline__ static XOperand whole_operand(uint32_t low) {
    if constexpr (kFewTokens) {
      return ptx::wgmma_operand_of(low);
    } else {
      return low;
    }
  }
  __device__ __forceinline__ static uint64_t operand_at(XOperand x, int offset) {
    if constexpr (kFewTokens) {
      return x + offset;
    } else {
      return ptx::wgmma_operand_of(x + offset);
    }
  }

  __device__ __forceinline__ void wait_for_products() {
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) ptx::keep_in_place(sum_[b]);
  }

  __device__ __forceinline__ uint32_t records(int b, int group, int stage) const {
    return records_place_ + (stage * S::kBlocks + b) * ring_.stage_record_bytes() +
           group * ring_.record_bytes();
  }

  template <bool kHalfScales>
  __device__ __forceinline__ void load_scales(int group, int stage) {
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) {
      if (kHalfScales) {
        const uint32_t pair = ptx::load_shared_4(records(b, group, stage) + scale_place_);
        const float2 wide = __half22float2(reinterpret_cast<const __half2&>(pair));
        new_scale_[b][0] = wide.x;
        new_scale_[b][1] = wide.y;
      } else {
        GroupValues<T, S::kBits, 1> values;
        values.load_scales(records(b, group, stage), w_);
        new_scale_[b][0] = values.scale[0][0];
        new_scale_[b][1] = values.scale[0][1];
      }
    }
  }

  __device__ __forceinline__ void change_zeros(int group, int stage, bool starts) {
    if (!starts || !has_zeros_) return;
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) values_[b].load_zeros(records(b, group, stage), w_);
  }

  __device__ __forceinline__ void set_scales() {
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        values_[b].scale[0][i] = new_scale_[b][i];
        quotient_[b][i] = 1.0f;
      }
    }
  }

  __device__ __forceinline__ void change_scales(bool starts) {
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) quotient_[b][0] = quotient_[b][1] = 1.0f;
    if (!starts) return;
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        quotient_[b][i] = ptx::divide_roughly(values_[b].scale[0][i], new_scale_[b][i]);
        values_[b].scale[0][i] = new_scale_[b][i];
      }
    }
  }

  // No product is under way.
  __device__ __forceinline__ void rescale() {
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < S::kSums; ++i) {
        sum_[b][i] = __fmul_rn(sum_[b][i], quotient_[b][i / 2 % 2]);
      }
      ptx::keep_in_place(sum_[b]);
    }
  }

  template <class B>
  __device__ __forceinline__ void load_codes(int i, int stage) {
    constexpr int kChunkSteps = std::min(B::kSteps, Layout::kChunkSteps);
    const uint32_t codes =
        codes_place_ + stage * S::kStageBytes + B::block(i) * S::kBlockStageBytes;
#pragma unroll
    for (int j = 0; j < B::kSteps; j += kChunkSteps) {
      const int step = B::step(i) + j;
      load_step_codes<S::kBits, kChunkSteps>(
          codes + S::chunk_of_stage(step / Layout::kChunkSteps) * S::kChunkBytes,
          step % Layout::kChunkSteps, &words_[j * kStepWords]);
    }
  }

  template <class B>
  __device__ __forceinline__ void decode_batch(int i) {
    const int b = B::block(i);
#pragma unroll
    for (int step = 0; step < B::kSteps; ++step) {
      auto& fragment = fragment_[b][B::step(i) + step];
      decode(fragment, &words_[step * kStepWords], values_[b].zero[0], T());
      ptx::keep_in_place(fragment);
    }
  }

  template <int kSteps>
  __device__ __forceinline__ void multiply_steps(int b, int first, XOperand x) {
#pragma unroll
    for (int step = first; step < first + kSteps; ++step) {
      const int chunk = step / Layout::kChunkSteps;
      ptx::wgmma_k16<T>(sum_[b], fragment_[b][step],
                        operand_at(x, (S::chunk_of_stage(chunk) * S::kXTileBytes +
                                       step % Layout::kChunkSteps * 32) /
                                          16));
    }
  }

  // --- the end of a part ---

  /// All whose sums go the same way.
  __device__ __forceinline__ void meet_all() const {
    if (shares_tile()) {
      meet_group();
    } else {
      ptx::named_barrier(1, S::kMultiplyThreads);
    }
  }
  __device__ __forceinline__ void meet_group() const { ptx::named_barrier(2 + group_, 128); }

  __device__ __forceinline__ void finish(const TilePart& part) {
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) {
      float factor[1][2];
      values_[b].final_factors(factor);
#pragma unroll
      for (int i = 0; i < S::kSums; ++i) sum_[b][i] = __fmul_rn(sum_[b][i], factor[0][i / 2 % 2]);
    }
    if (shares_tile()) {
      // Block r of a pair gets what both have of the features of warpgroup r.
      const int rank = blockIdx.x % 2;
      if (group_ != rank) {
        send(rank ^ 1);
        return;
      }
      receive();
    }
    if (shares_tile() ? pair() + 1 < params_.schedule.pair_parts / 2 : part.end < params_.slabs) {
      leave_part();
      return;
    }
    if (shares_tile() ? pair() > 0 : part.begin > 0) add_parts(part);
    store(part);
  }

  /// Of those that share this tile, whose blocks stand side by side.
  __device__ __forceinline__ int pair() const {
    return blockIdx.x % params_.schedule.pair_parts / 2;
  }

  __device__ __forceinline__ bool shares_tile() const {
    return S::kMayShareTile && params_.schedule.pair_parts > 0;
  }

  static constexpr int kThreadValues = S::kGroupBlocks * S::kSums / 4;  // of 16 bytes

  // A pair shares one tile in a kernel, so that the place is free from the start.
  __device__ __forceinline__ void send(int block) const {
    const uint32_t place = ptx::address_in_block(ring_.output() + threadIdx.x % 128 * 16,
                                                 static_cast<uint32_t>(block));
    const uint32_t barrier = ptx::address_in_block(ring_.received(), static_cast<uint32_t>(block));
#pragma unroll
    for (int i = 0; i < kThreadValues; ++i) {
      const float* const sums = &sum_[i / (S::kSums / 4)][i % (S::kSums / 4) * 4];
      ptx::store_async(place + i * (128 * 16), make_float4(sums[0], sums[1], sums[2], sums[3]),
                       barrier);
    }
  }

  __device__ __forceinline__ void receive() {
    const uint32_t place = ring_.output() + threadIdx.x % 128 * 16;
    ptx::barrier_wait(ring_.received(), 0);
#pragma unroll
    for (int i = 0; i < kThreadValues; ++i) {
      add(i, ptx::load_shared_float4(place + i * (128 * 16)));
      // Or all are read before the first is added.
      if (i % 4 == 3) ptx::keep_in_place(sum_[i / (S::kSums / 4)]);
    }
  }

  __device__ __forceinline__ void add(int i, float4 value) {
    float* const sums = &sum_[i / (S::kSums / 4)][i % (S::kSums / 4) * 4];
    sums[0] += value.x;
    sums[1] += value.y;
    sums[2] += value.z;
    sums[3] += value.w;
  }

  __device__ __forceinline__ float4* part_of_block(int block) const {
    return part_place<S>(params_.scratch, block);
  }

  /// The block, or the pair, with the first slabs of a tile.
  __device__ __forceinline__ int first_unit(const TilePart& part) const {
    const int parts = params_.schedule.parts;
    return parts > 0 ? unit<S>() - (parts - 1)
                     : params_.tail.block_of(part.tail_tile * params_.slabs);
  }

  __device__ __forceinline__ void leave_part() const {
    if (params_.schedule.parts > 0) {
      if (threadIdx.x == 0) ptx::wait_for_flag(params_.scratch.flags + blockIdx.x, false);
      meet_all();
    }
    leave_sums<S>(part_of_block(blockIdx.x), sum_);
    meet_all();
    const bool first = shares_tile() ? threadIdx.x % 128 == 0 : threadIdx.x == 0;
    if (first) ptx::raise_flag(params_.scratch.flags + blockIdx.x);
  }

  // Those of blocks one `step` apart, which have the same features, the nearest first. They have started before this
  // block, since blocks start in the order of their numbers, and work on this tile before all others of their tail.
  __device__ __forceinline__ void add_parts(const TilePart& part) {
    const int step = shares_tile() ? 2 : S::kClusterBlocks;
    const int first = shares_tile() ? static_cast<int>(blockIdx.x) - 2 * pair()
                                    : first_unit(part) * S::kClusterBlocks + rank_in_unit<S>();
    const int threads = shares_tile() ? 128 : S::kMultiplyThreads;
    const int last = static_cast<int>(blockIdx.x) - step;
    const int of_thread = last - static_cast<int>(threadIdx.x % threads) * step;
    for (int block = of_thread; block >= first; block -= threads * step) {
      ptx::wait_for_flag(params_.scratch.flags + block, true);
    }
    meet_all();
    int block = last;
    if constexpr (S::kPartsTogether > 1) {
#pragma unroll 1
      for (; block - (S::kPartsTogether - 1) * step >= first; block -= S::kPartsTogether * step) {
        add_some_parts<S::kPartsTogether>(block, step);
      }
    }
#pragma unroll 1
    for (; block >= first; block -= step) add_some_parts<1>(block, step);
    meet_all();
    for (block = of_thread; block >= first; block -= threads * step) {
      ptx::lower_flag(params_.scratch.flags + block);
    }
  }

  // On their way together; in the sums one after the other.
  template <int kParts>
  __device__ __forceinline__ void add_some_parts(int last, int step) {
    float4 values[kParts][kThreadValues];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const float4* const place = part_of_block(last - part * step);
#pragma unroll
      for (int i = 0; i < kThreadValues; ++i) {
        values[part][i] = __ldcg(place + i * S::kMultiplyThreads);
      }
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < kThreadValues; ++i) add(i, values[part][i]);
    }
  }

  // A lane's sums 4 j + i are feature g of its strip, of g + 8 for i of 2 and 3, and tokens 8 j + 2t and
  // 8 j + 2t + 1.
  __device__ __forceinline__ void store(const TilePart& part) {
    const int token = part.token_tile * S::kTokens;
    const int first_block = part.feature_tile * S::kBlocks + group_ * S::kGroupBlocks;
    if (params_.boxes) {
      if (stores()) ptx::wait_for_stores_to_read();
      meet_group();
    }
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) {
      const int feature =
          (first_block + b) * Layout::kBlockFeatures + warp_ * Layout::kStripFeatures + lane_ / 4;
      if (w_.bias != nullptr) {
        const float low = feature < w_.n ? __ldg(w_.bias + feature) : 0.0f;
        const float high = feature + 8 < w_.n ? __ldg(w_.bias + feature + 8) : 0.0f;
#pragma unroll
        for (int i = 0; i < S::kSums; ++i) sum_[b][i] += i / 2 % 2 == 0 ? low : high;
      }
      if (params_.boxes) {
        turn(b);
      } else if (p_.y_type == FloatType::kF32) {
        store_singles<float>(b, token, feature);
      } else if (p_.y_type == FloatType::kF16) {
        store_singles<__half>(b, token, feature);
      } else {
        store_singles<__nv_bfloat16>(b, token, feature);
      }
    }
    if (!params_.boxes) return;
    ptx::fence_for_async_reads();
    meet_group();
    if (stores()) {
      for (int b = 0; b < S::kGroupBlocks; ++b) {
        for (int begin = 0; begin < S::kTokens; begin += S::kOutputTokens) {
          ptx::tensor_store(params_.y_map, (first_block + b) * Layout::kBlockFeatures,
                            token + begin, box(b, begin / S::kOutputTokens));
        }
      }
      ptx::commit_stores();
    }
  }

  /// The thread of the warpgroup that stores its boxes.
  __device__ __forceinline__ bool stores() const { return threadIdx.x % 128 == 0; }

  __device__ __forceinline__ uint32_t box(int b, int piece) const {
    return ring_.output() + group_ * S::kGroupOutputBytes +
           (b * (S::kTokens / S::kOutputTokens) + piece) * S::kBoxBytes;
  }

  // Into boxes, a token a row.
  __device__ __forceinline__ void turn(int b) const {
#pragma unroll
    for (int j = 0; j < S::kTokens / 8; j += 2) {
      const int row = 8 * (j + lane_ / 16) + lane_ % 8;
      const uint32_t turned[4] = {sm80::round_pair<T>(sum_[b][4 * j], sum_[b][4 * j + 1]),
                                  sm80::round_pair<T>(sum_[b][4 * j + 2], sum_[b][4 * j + 3]),
                                  sm80::round_pair<T>(sum_[b][4 * j + 4], sum_[b][4 * j + 5]),
                                  sm80::round_pair<T>(sum_[b][4 * j + 6], sum_[b][4 * j + 7])};
      ptx::stmatrix_x4_transposed(
          box(b, 8 * j / S::kOutputTokens) +
              sm80::x_piece_place(row % S::kOutputTokens, 2 * warp_ + lane_ / 8 % 2),
          turned);
    }
  }

  template <class Y>
  __device__ __forceinline__ void store_singles(int b, int first_token, int feature) const {
    const int token = first_token + lane_ % 4 * 2;
    auto* const y = static_cast<Y*>(p_.y) + token * p_.y_stride + feature;
#pragma unroll
    for (int i = 0; i < S::kSums; ++i) {
      const int more_tokens = i / 4 * 8 + i % 2;
      const int more_features = i / 2 % 2 * 8;
      ptx::store_if(token + more_tokens < p_.m && feature + more_features < w_.n,
                    y + more_tokens * p_.y_stride + more_features, sm80::round_to<Y>(sum_[b][i]));
    }
  }

  const TileParams& params_;
  const GemmProblem& p_;
  const WeightView& w_;
  TileRing<S> ring_;
  int group_, warp_, lane_;
  int stage_ = 0;
  uint32_t parity_ = 0;
  uint32_t x_operand_, codes_place_, records_place_;  // in the first stage
  uint32_t scale_place_;                              // in a record
  bool has_zeros_;
  static constexpr int kStepWords = S::kBits / 4;
  uint32_t words_[(S::kGroupBlocks == 1 ? 1 : kSlabChunks) * Layout::kChunkSteps * kStepWords];
  GroupValues<T, S::kBits, 1> values_[S::kGroupBlocks];
  float new_scale_[S::kGroupBlocks][2];
  float quotient_[S::kGroupBlocks][2];  // what sums are multiplied by when the next unit begins
  uint32_t fragment_[S::kGroupBlocks][kSlabSteps][4];
  float sum_[S::kGroupBlocks][S::kSums];
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    tile_gemm(const __grid_constant__ TileParams params) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const TileRing<S> ring(params, shared);
  const bool shares_tile = S::kMayShareTile && params.schedule.pair_parts > 0;
  if (threadIdx.x >= S::kMultiplyThreads &&
      (params.problem.weight.num_groups & (params.slab_groups - 1)) != 0) {
    ring.clear_records();
  }
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < ring.stages(); ++stage) {
      ptx::barrier_init(ring.filled(stage), 2 * S::kBlocks);
      ptx::barrier_init(ring.x_filled(stage), S::kClusterBlocks == 2 ? 1 : S::kStageChunks);
      ptx::barrier_init(ring.emptied(stage), S::kClusterBlocks * (S::kMultiplyThreads / 32));
    }
    if (shares_tile) ptx::barrier_init(ring.received(), 1);
    ptx::barrier_init_fence();
    if (shares_tile) ptx::barrier_expect(ring.received(), S::kHalfTileBytes);
  }
  __syncthreads();
  if (S::kClusterBlocks == 2 || shares_tile) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  if (threadIdx.x >= S::kMultiplyThreads) {
    ptx::give_registers<S::kFillRegisters>();
    const int role = threadIdx.x / 32 - S::kMultiplyThreads / 32;
    if (role == 0) TileFill<S, FillRole::kCodes>(params, ring).run();
    if (role == 1) TileFill<S, FillRole::kRecords>(params, ring).run();
    if (role == 2) TileFill<S, FillRole::kX>(params, ring).run();
  } else {
    ptx::take_registers<S::kMultiplyRegisters>();
    TileMultiply<S>(params, ring).run();
  }
  if constexpr (S::kClusterBlocks == 2) {
    // The other block still arrives on barriers of this one.
    __syncwarp();
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

}  // namespace marlinq::cuda::sm90
