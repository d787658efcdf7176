// The loop that the tile kernels of the sm_80 family share: dense layers and experts.
//
// A block computes tiles of kFeatureWarps * 64 features x kTokens tokens; a warp holds 64 features x
// kTokenTiles * 8 tokens of it in registers, so that a decoded weight fragment serves all of them and
// an ldmatrix of x serves 4 fragments. kRowWarps groups of warps share K, and add their sums at the
// end through shared memory. Blocks walk over segments of tiles (TileSchedule); the parts of a tile
// that is cut between blocks are added by the last of them, in a fixed order.
//
// Scales: one set of accumulators, in units of the current group's scale. When the group changes
// they are multiplied by the quotient of the two scales: as exact as adding scaled sums, at the same
// cost, with half of the registers. Layout guarantees that no scale is 0, WeightView::scales_divide
// that no quotient overflows. Where every chunk has several groups, some shapes multiply codes by scales instead
// (code_scales.cuh). Shapes that promote need no such weights: they add the scaled sums of
// each group to a second set.
//
// Shared memory: a stage is one slice for each group of row warps,
//   [x tile, 128-byte rows][codes][group records of each feature warp]
// filled by that group with cp.async. The ring is primed once and goes on into the next segment while
// the last one is stored, unless the sums of several groups need its room.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <climits>
#include <cstdint>

#include "cuda/arch/sm80/code_scales.cuh"
#include "cuda/arch/sm80/group_values.cuh"
#include "cuda/arch/sm80/layout.hpp"
#include "cuda/arch/sm80/plan.hpp"
#include "cuda/arch/sm80/share.hpp"
#include "cuda/arch/sm80/x_tile.cuh"
#include "cuda/device/dequantize.cuh"
#include "cuda/problem.hpp"
#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/flag.cuh"
#include "cuda/ptx/launch.cuh"
#include "cuda/ptx/mma.cuh"

namespace marlinq::cuda::sm80 {

/// What groups a shape is for.
enum class TileGroups {
  kAny,         // by loops for long and for other ones
  kAnyOrCodes,  // the same, and codes are multiplied by the scales of short groups (has_short_groups)
  kShortCodes,  // these alone
  kLookedUp,    // GroupForm::kAny alone
  kShortSums,   // GroupForm::kShort; the shape keeps sums of a group apart
  kLong,        // GroupForm::kLong
  kPlainLong,   // GroupForm::kPlainLong
};

template <class T_, int kBits_, int kFeatureWarps_, int kRowWarps_, int kTokenTiles_,
          bool kPromotes_ = false, TileGroups kGroups_ = TileGroups::kAny>
struct TileShape {
  using T = T_;
  static constexpr int kBits = kBits_;
  static constexpr int kFeatureWarps = kFeatureWarps_;
  static constexpr int kRowWarps = kRowWarps_;
  static constexpr int kTokenTiles = kTokenTiles_;  // of a warp
  static constexpr bool kPromotes = kPromotes_;
  static constexpr TileGroups kGroups = kGroups_;
  static constexpr GroupForm kForm =
      kGroups == TileGroups::kShortCodes || kGroups == TileGroups::kShortSums ? GroupForm::kShort
      : kGroups == TileGroups::kLong                                          ? GroupForm::kLong
      : kGroups == TileGroups::kPlainLong ? GroupForm::kPlainLong
                                          : GroupForm::kAny;
  static constexpr Records kRecords = records_of(kForm);
  static constexpr bool kLongGroups = has_long_groups(kForm);
  static constexpr int kStrips = Layout::kBlockStrips;
  static constexpr int kGroupThreads = kFeatureWarps * 32;  // that share a slice
  static constexpr int kThreads = kGroupThreads * kRowWarps;
  static constexpr int kFeatures = kFeatureWarps * Layout::kBlockFeatures;
  static constexpr int kTokens = kTokenTiles * 8;
  static constexpr int kTileFloats = kFeatures * kTokens;
  // Blocks that share a multiprocessor: what registers allow.
  static constexpr int kBlocksTogether =
      kFeatureWarps == 1 ? 2
                         : (kThreads > 128 ? 1 : (kTokenTiles > 4 ? 2 : (kTokenTiles > 2 ? 3 : 4)));
  static constexpr int kPieces = kBits / 4;
  static constexpr int kStripBytes = kPieces * 512;  // codes of a strip and chunk
  static constexpr int kBlockBytes = kStrips * kStripBytes;
  static constexpr int kXBytes = kTokens * kXRowBytes;
  static constexpr int kSliceBytes = kXBytes + kFeatureWarps * kBlockBytes;  // without records
  // A stage holds a slice for each group of row warps; many groups leave room for few stages, and
  // need few.
  static constexpr int kStages = std::clamp(208 * 1024 / (kRowWarps * kSliceBytes), 2, 4);
  // A unit: the sums of a strip and a token tile. Row warps share those of a tile at its end.
  static constexpr int kUnits = kStrips * kTokenTiles;
  static constexpr int kOwnUnits = (kUnits + kRowWarps - 1) / kRowWarps;
  // Two groups of row warps exchange half of their sums beside the ring, where there is room; more of
  // them use the ring.
  static constexpr bool kExchanges =
      kRowWarps == 2 &&
      kStages * kRowWarps * kSliceBytes + kTileFloats * 4 <= 200 * 1024 / kBlocksTogether;
  static constexpr int kSumBytes =
      kExchanges ? kTileFloats * 4 : (kRowWarps > 1 ? kRowWarps * kTileFloats * 4 : 0);
  // The ring goes on into the next segment while the last one is stored.
  static constexpr bool kStreams = kRowWarps == 1 || kExchanges;
  static_assert(kTokenTiles == 1 || kTokenTiles % 2 == 0);
  static_assert(kGroups != TileGroups::kShortSums || kPromotes);
  static_assert((kGroups != TileGroups::kShortCodes && kGroups != TileGroups::kAnyOrCodes) ||
                !kPromotes);
};

/// A range of chunks of one tile.
struct TilePosition {
  int feature_tile = 0;
  int token_tile = 0;
  int tail_tile = 0;  // where the tile is cut
  int begin = 0;
  int end = 0;
  int length = 0;  // chunks of a group of row warps, at most
};

/// The loop over the chunks of a segment, and the handing over of parts of tiles. Self says where
/// tiles are; it offers
///   start_fill(segment): begin to fill with it, or with the next that has chunks for this group
///   fill_x(slot, on): copies the rows of x of the next chunk to be filled
///   upper_codes(): how many pieces of 16 bytes lie between the codes of strips 0 and 1 and those of
///     strips 2 and 3
///   groups_to_fill(chunk), groups_of(chunk): of the segment that is filled, or multiplied
///   schedule(), tail(), chunk_divider(), place_tile(at, tile): the walk
///   is_unit(i): whether the i-th of a warp's units is needed
template <class S, class Self>
class TileLoop {
 public:
  using T = typename S::T;

 protected:
  __device__ __forceinline__ TileLoop(const GemmProblem& problem, const SplitScratch& scratch,
                                      unsigned char* shared, int slice_bytes)
      : p_(problem), w_(problem.weight), scratch_(scratch), shared_(shared) {
    const int warp = threadIdx.x / 32;
    lane_ = threadIdx.x % 32;
    row_warp_ = warp / S::kFeatureWarps;
    feature_warp_ = warp % S::kFeatureWarps;
    stage_bytes_ = S::kRowWarps * slice_bytes;
    ring_ = ptx::shared_address(shared) + row_warp_ * slice_bytes;
    ring_end_ = ring_ + S::kStages * stage_bytes_;
    codes_place_ = S::kXBytes + feature_warp_ * S::kBlockBytes + lane_ * 16;
    // One token tile: two steps of it are one ldmatrix. More: a step of two of them.
    x_place_ = S::kTokenTiles == 1 ? x_piece_place(lane_ % 8, lane_ / 8)
                                   : x_piece_place(lane_ / 16 * 8 + lane_ % 8, lane_ / 8 % 2);
    const int thread = threadIdx.x % S::kGroupThreads;
    fill_x_place_ = x_piece_place(thread / 8, thread % 8);
    // The loop is to hold these in registers, not to work them out for every chunk.
    ptx::forget_origin(codes_place_);
    ptx::forget_origin(x_place_);
    ptx::forget_origin(fill_x_place_);
    ptx::forget_origin(stage_bytes_);
  }

  // The next stage is there; the slot of the one before is free, as all warps of the group have read
  // it.
  __device__ __forceinline__ void meet_group() const {
    ptx::copy_wait<S::kStages - 2>();
    if constexpr (S::kRowWarps == 1) {
      __syncthreads();
    } else if constexpr (S::kGroupThreads == 32) {
      __syncwarp();
    } else {
      ptx::named_barrier(1 + row_warp_, S::kGroupThreads);
    }
  }

  // --- the walk over segments ---

  // The segments of a block: its whole tiles, then its run of tail tiles, the last of them first.
  __device__ __forceinline__ int tail_tile(int segment) const {
    return self().chunk_divider().divide(self().tail().begin(blockIdx.x + 1) - 1) -
           (segment - self().schedule().whole_tiles);
  }

  __device__ __forceinline__ bool has_segment(int segment) const {
    if (segment < self().schedule().whole_tiles) return true;
    return blockIdx.x < self().schedule().tail_blocks &&
           (tail_tile(segment) + 1) * w_.chunks > self().tail().begin(blockIdx.x);
  }

  // Of one that there is.
  __device__ __forceinline__ void load_segment(TilePosition& at, int segment) const {
    const TileSchedule& schedule = self().schedule();
    int tile = segment * gridDim.x + blockIdx.x;
    at.begin = 0;
    at.end = w_.chunks;
    if (segment >= schedule.whole_tiles) {
      at.tail_tile = tail_tile(segment);
      tile = schedule.whole_tiles * gridDim.x + at.tail_tile;
      const int first = at.tail_tile * w_.chunks;
      at.begin = max(self().tail().begin(blockIdx.x) - first, 0);
      at.end = min(self().tail().begin(blockIdx.x + 1) - first, w_.chunks);
    }
    self().place_tile(at, tile);
    at.length = (at.end - at.begin + S::kRowWarps - 1) / S::kRowWarps;
  }

  // The chunks of this warp's group in a segment.
  __device__ __forceinline__ int first_chunk(const TilePosition& at) const {
    return at.begin + row_warp_ * at.length;
  }
  __device__ __forceinline__ int chunks_of(const TilePosition& at) const {
    return max(min(at.length, at.end - first_chunk(at)), 0);
  }

  // --- filling the ring ---

  // Pointers to the next chunk of the segment, whether there is one or not.
  __device__ __forceinline__ void step_fill() {
    ++fill_chunk_;
    fill_codes_ += S::kBlockBytes / 16;
    fill_x_ += Layout::kChunkRows / 8;
  }
  __device__ __forceinline__ void step_fill_back(int steps) {
    fill_left_ += steps;
    fill_chunk_ -= steps;
    fill_codes_ -= steps * (S::kBlockBytes / 16);
    fill_x_ -= steps * (Layout::kChunkRows / 8);
  }

  // So many chunks of the segment are on their way.
  __device__ __forceinline__ void count_fill(int chunks) {
    fill_left_ -= chunks;
    if (fill_left_ > 0) return;
    if (S::kStreams) self().start_fill(fill_segment_ + 1);
    if (fill_left_ <= 0 && last_fill_) ptx::launch_dependents();
  }

  // What the next chunk to be filled is like: the group that it starts with; the columns of x that it
  // has for this thread. And, with few of them, groups that start inside the chunk and columns that
  // x does not have. Returns for how many chunks the same holds.
  template <GroupForm kForm = S::kForm>
  __device__ __forceinline__ int prepare_fill(uint32_t slot) {
    fill_x_on_ = true;
    if ((kForm != GroupForm::kAny || w_.chunk_shift >= 0) && fill_chunk_ != missing_chunk()) {
      return fill_chunk_ < missing_chunk() ? missing_chunk() - fill_chunk_ : INT_MAX;
    }
    fill_rest(slot);
    return 1;
  }
  __device__ __forceinline__ int missing_chunk() const {
    return p_.x_columns % Layout::kChunkRows == 0 ? -1 : p_.x_columns / Layout::kChunkRows;
  }

  __device__ __forceinline__ int group_bytes() const { return S::kStrips * w_.record_bytes; }
  __device__ __forceinline__ int chunk_group_bytes() const {
    return w_.groups_per_chunk * group_bytes();
  }
  __device__ __forceinline__ uint32_t records(uint32_t slice) const {
    return slice + S::kSliceBytes + feature_warp_ * chunk_group_bytes();
  }

  template <GroupForm kForm>
  __device__ __forceinline__ void fill(uint32_t slot, bool on) const {
    fill_weights<kForm>(slot, on);
    self().fill_x(slot, on);
  }

  // Sources are counted in pieces of 16 bytes: half of the registers of pointers.
  __device__ __forceinline__ static const uint4* piece_at(const void* base, uint32_t piece) {
    return static_cast<const uint4*>(base) + piece;
  }
  __device__ __forceinline__ const uint4* record_source(int group) const {
    return piece_at(w_.groups, fill_records_ + group * (group_bytes() / 16));
  }

  // The records of a chunk's short groups come together.
  template <GroupForm kForm = S::kForm>
  __device__ __forceinline__ void fill_weights(uint32_t slot, bool on) const {
    const uint32_t target = slot + codes_place_;
    const uint4* source = piece_at(w_.codes, fill_codes_);
    constexpr int kHalf = S::kStrips * S::kPieces / 2;
#pragma unroll
    for (int piece = 0; piece < kHalf; ++piece) {
      ptx::copy_async_if(on, target + piece * 512, source + piece * 32);
    }
    const uint4* upper = source + self().upper_codes();
#pragma unroll
    for (int piece = kHalf; piece < 2 * kHalf; ++piece) {
      ptx::copy_async_if(on, target + piece * 512, upper + piece * 32);
    }
    constexpr bool kShortGroups = kForm == GroupForm::kShort;
    constexpr bool kLongGroups = has_long_groups(kForm);
    const int group = kShortGroups                         ? fill_chunk_ * w_.groups_per_chunk
                      : kLongGroups || w_.chunk_shift >= 0 ? fill_chunk_ >> w_.chunk_shift
                                                           : fill_group_;
    const int bytes = kShortGroups ? chunk_group_bytes() : group_bytes();
    ptx::copy_async_if(on && lane_ * 16 < bytes, records(slot) + lane_ * 16, record_source(group));
  }

  // A group's records of 4 strips have at most 320 bytes, so a lane copies 16.
  __device__ __forceinline__ void fill_rest(uint32_t slot) {
    const ChunkGroups groups = self().groups_to_fill(fill_chunk_);
    fill_group_ = groups.first();
    if (groups.changes() && lane_ * 16 < group_bytes()) {
#pragma unroll 1
      for (int i = 1; i < groups.count(); ++i) {
        ptx::copy_async(records(slot) + i * group_bytes() + lane_ * 16,
                        record_source(groups.first() + i));
      }
    }
    fill_x_on_ = fill_chunk_ * Layout::kChunkRows + threadIdx.x % 8 * 8 < p_.x_columns;
    clear_missing_columns(slot, fill_chunk_, p_, S::kTokens, threadIdx.x % S::kGroupThreads,
                          S::kGroupThreads);
  }

  // --- the product ---

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
      values_.scale[s][0] = values_.scale[s][1] = 0.0f;
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum_[s][t][i] = 0.0f;
          if constexpr (S::kPromotes) part_[s][t][i] = 0.0f;
        }
      }
    }
  }

  __device__ __forceinline__ void scale_sums(const float (&factor)[S::kStrips][2]) {
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) scale_units(s, 0, S::kTokenTiles, factor);
  }
  __device__ __forceinline__ void scale_units(int s, int first, int count,
                                              const float (&factor)[S::kStrips][2]) {
#pragma unroll
    for (int t = first; t < first + count; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum_[s][t][i] = __fmul_rn(sum_[s][t][i], factor[s][i / 2]);
    }
  }

  // The sums in units of the last group's scale, or those of the last group, become sums of all.
  __device__ __forceinline__ void finish_groups() {
    if constexpr (S::kPromotes) {
      promote();
#pragma unroll
      for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
        for (int t = 0; t < S::kTokenTiles; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum_[s][t][i] *= ZeroPair<T, S::kBits>::unit(i);
        }
      }
    } else {
      float factor[S::kStrips][2];
      values_.final_factors(factor);
      scale_sums(factor);
    }
  }
  __device__ __forceinline__ void promote() {
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
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

  __device__ __forceinline__ void change_group(uint32_t group_records) {
    if constexpr (S::kPromotes) {
      promote();
      values_.template load<S::kRecords>(group_records, w_);
    } else {
      float quotient[S::kStrips][2];
      values_.template change<S::kRecords>(group_records, w_, quotient);
      scale_sums(quotient);
    }
  }

  // The product of `left` chunks, the first of them in `stage`, with the first kActive token tiles;
  // returns the stage after them.
  template <int kActive>
  __device__ __forceinline__ uint32_t multiply_chunks(uint32_t stage, int chunk, int left) {
    if constexpr (S::kForm == GroupForm::kShort) {
      return multiply_short_groups<kActive>(stage, left);
    } else if constexpr (S::kLongGroups) {
      return multiply_long_groups<kActive>(stage, chunk, left);
    } else if constexpr (S::kGroups == TileGroups::kLookedUp) {
      return multiply_any_groups<kActive>(stage, chunk, left);
    } else {
      if (w_.chunk_shift >= 0) return multiply_long_groups<kActive>(stage, chunk, left);
      if constexpr (S::kGroups == TileGroups::kAnyOrCodes) {
        if (has_short_groups(w_)) return multiply_short_groups<kActive>(stage, left);
      }
      return multiply_any_groups<kActive>(stage, chunk, left);
    }
  }

  template <int kActive>
  __device__ __forceinline__ uint32_t multiply_any_groups(uint32_t stage, int chunk, int left) {
    int quant_group = -1;
    int fill_run = 0;  // chunks for which the filling of stages is settled
    int filled = 0;
#pragma unroll 1
    for (; left > 0; --left) {
      meet_group();
      if (fill_run == 0) settle_fill<GroupForm::kAny>(fill_run, filled, left);
      --fill_run;
      const ChunkGroups groups = self().groups_of(chunk);
      if (groups.first() != quant_group) change_group(records(stage));
      quant_group = groups.last();
      ++chunk;
      const float none[S::kStrips][2] = {};
      multiply_steps<kActive, Change::kAny>(stage, groups, none, filled > 0);
      stage = step_ring(stage);
    }
    if (filled > 0) count_fill(filled);
    return stage;
  }

  // The same where every chunk has several groups.
  template <int kActive>
  __device__ __forceinline__ uint32_t multiply_short_groups(uint32_t stage, int left) {
    int fill_run = 0;
    int filled = 0;
#pragma unroll 1
    for (; left > 0; --left) {
      meet_group();
      if (fill_run == 0) settle_fill<GroupForm::kShort>(fill_run, filled, left);
      --fill_run;
      const float none[S::kStrips][2] = {};
      constexpr Change kChange = S::kPromotes ? Change::kParts : Change::kScaled;
      multiply_steps<kActive, kChange>(stage, ChunkGroups{0}, none, filled > 0);
      stage = step_ring(stage);
    }
    if (filled > 0) count_fill(filled);
    if constexpr (!S::kPromotes) set_scaled_units(values_);
    return stage;
  }

  // The same where groups have whole chunks.
  template <int kActive>
  __device__ __forceinline__ uint32_t multiply_long_groups(uint32_t stage, int chunk, int left) {
    int fill_run = 0;
    int filled = 0;
    int change_chunk = chunk;  // where the next group starts
#pragma unroll 1
    for (; left > 0; --left) {
      meet_group();
      if (fill_run == 0) settle_fill<GroupForm::kLong>(fill_run, filled, left);
      --fill_run;
      const bool fills = filled > 0;
      float quotient[S::kStrips][2] = {};
      bool scales_sums = false;
      if (chunk == change_chunk) {
        change_chunk = next_change(w_, chunk);
        if constexpr (S::kPromotes) {
          change_group(records(stage));
        } else {
          values_.template change<S::kRecords>(records(stage), w_, quotient);
          scales_sums = true;
        }
      }
      ++chunk;
      if (scales_sums) {
        multiply_steps<kActive, Change::kFirst>(stage, ChunkGroups{0}, quotient, fills);
      } else {
        multiply_steps<kActive, Change::kNone>(stage, ChunkGroups{0}, quotient, fills);
      }
      stage = step_ring(stage);
    }
    if (filled > 0) count_fill(filled);
    return stage;
  }

  // For how many chunks it is the same whether stages are filled.
  template <GroupForm kForm>
  __device__ __forceinline__ void settle_fill(int& run, int& filled, int left) {
    if (filled > 0) count_fill(filled);
    filled = 0;
    run = left;
    if (fill_left_ > 0) {
      run = min(left, min(fill_left_, prepare_fill<kForm>(fill_slot_)));
      filled = run;
    }
  }

  __device__ __forceinline__ uint32_t step_ring(uint32_t stage) {
    ptx::copy_commit();
    step_fill();
    fill_slot_ = stage;
    stage += stage_bytes_;
    return stage == ring_end_ ? ring_ : stage;
  }

  // Where groups may start: at no step, at the first, at any; or they are short, and codes multiplied by scales, or their
  // sums kept apart.
  enum class Change { kNone, kFirst, kAny, kScaled, kParts };

  __device__ __forceinline__ void load_scales(CodeScales<T, S::kBits> (&scales)[S::kStrips],
                                              uint32_t group_records) {
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
      scales[s].load(group_records + s * w_.record_bytes, w_.scale_type);
    }
    values_.load_zeros(group_records, w_);
  }

  // `quotient`: for kFirst, by which sums are to be multiplied before the first products, here because
  // products hide it.
  template <int kActive, Change kChange>
  __device__ __forceinline__ void multiply_steps(uint32_t slice, const ChunkGroups& groups,
                                                 const float (&quotient)[S::kStrips][2],
                                                 bool fills) {
    constexpr int kPieceSteps = Layout::kChunkSteps / S::kPieces;
    constexpr int kPairs = (kActive + 1) / 2;
    constexpr bool kShortGroups = kChange == Change::kScaled || kChange == Change::kParts;
    const uint32_t codes = slice + codes_place_;
    uint32_t group_records = records(slice);
    // Two tiles of 8 tokens and 16 rows, or one and 32, are one ldmatrix. Those of the next step follow
    // into the same registers as soon as the last strip of a step has used them.
    const uint32_t x_row = slice + x_place_;
    uint32_t x[kPairs][4];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) load_x(x[pair], x_row, pair, 0);
    uint32_t words[S::kStrips][4];
    load_codes(words, codes, 0);
    uint32_t a[2][4];
    CodeScales<T, S::kBits> scales[S::kStrips];
    if constexpr (kChange == Change::kScaled) load_scales(scales, group_records);
    if constexpr (kChange == Change::kParts) values_.load(group_records, w_);
    const auto decode_strip = [&](uint32_t (&fragment)[4], int strip, int step) {
      decode(fragment, &words[strip][step % kPieceSteps * S::kPieces], values_.zero[strip], T());
      if constexpr (kChange == Change::kScaled) scales[strip].apply(fragment);
    };
    decode_strip(a[0], 0, 0);
    if (kChange == Change::kFirst) scale_units(0, 0, kActive, quotient);
    // The copies of a step to come go among the products of this one.
    fill<kShortGroups ? GroupForm::kShort : S::kForm>(fill_slot_, fills);
#pragma unroll
    for (int step = 0; step < Layout::kChunkSteps; ++step) {
      if (kChange == Change::kAny && step > 0 && groups.starts(step)) {
        group_records += group_bytes();
        change_group(group_records);
        // The zero points are new.
        decode_strip(a[0], 0, step);
      }
      if (kChange == Change::kParts && step > 0 && starts_short_group(w_, step)) {
        promote();
        values_.load_scales(group_records, w_);
      }
#pragma unroll
      for (int s = 0; s < S::kStrips; ++s) {
        const bool last_strip = s + 1 == S::kStrips;
        const int next_step = last_strip ? step + 1 : step;
        const int next_strip = last_strip ? 0 : s + 1;
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
          for (int half = 0; half < std::min(2, kActive - 2 * pair); ++half) {
            const int from = S::kTokenTiles == 1 ? step % 2 : half;
            auto& sums = accumulators();
            ptx::mma_m16n8k16<T>(sums[s][2 * pair + half], a[s % 2], x[pair][2 * from],
                                 x[pair][2 * from + 1]);
          }
          if (last_strip && next_step < Layout::kChunkSteps &&
              (S::kTokenTiles > 1 || next_step % 2 == 0)) {
            load_x(x[pair], x_row, pair, next_step);
          }
          // The next fragment is decoded, and the next sums scaled, while this one is multiplied.
          if (kChange == Change::kFirst && step == 0 && !last_strip) {
            scale_units(next_strip, 2 * pair, std::min(2, kActive - 2 * pair), quotient);
          }
          if (pair == 0 && next_step < Layout::kChunkSteps) {
            if (last_strip && next_step % kPieceSteps == 0) {
              load_codes(words, codes, next_step / kPieceSteps);
            }
            // All fragments of this step are decoded.
            if (kShortGroups && last_strip && starts_short_group(w_, next_step)) {
              group_records += group_bytes();
              if constexpr (kChange == Change::kScaled) {
                load_scales(scales, group_records);
              } else {
                values_.load_zeros(group_records, w_);
              }
            }
            decode_strip(a[(s + 1) % 2], next_strip, next_step);
          }
        }
      }
    }
    if constexpr (kChange == Change::kParts) promote();
  }

  __device__ __forceinline__ auto& accumulators() {
    if constexpr (S::kPromotes) {
      return part_;
    } else {
      return sum_;
    }
  }

  __device__ __forceinline__ void load_codes(uint32_t (&words)[S::kStrips][4], uint32_t codes,
                                             int piece) const {
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
      const uint4 q = ptx::load_shared_16(codes + s * S::kStripBytes + piece * 512);
      words[s][0] = q.x;
      words[s][1] = q.y;
      words[s][2] = q.z;
      words[s][3] = q.w;
    }
  }

  // The pieces of a step differ from those of step 0 in bits 5 and 6 of their place alone.
  __device__ __forceinline__ static void load_x(uint32_t (&x)[4], uint32_t row, int pair,
                                                int step) {
    ptx::ldmatrix_x4(x, (row ^ (step * 32)) + pair * (16 * kXRowBytes));
  }

  // --- the end of a segment ---

  // The units of this warp: all of its sums, or when row warps have added theirs its share, in the
  // first kOwnUnits.
  __device__ __forceinline__ int own_unit(int i) const {
    return S::kRowWarps == 1 ? i : row_warp_ * S::kOwnUnits + i;
  }
  __device__ __forceinline__ bool is_unit(int i) const {
    return S::kUnits % S::kRowWarps == 0 || own_unit(i) < S::kUnits;
  }
  __device__ __forceinline__ float (&own(int i))[4] {
    return sum_[i / S::kTokenTiles][i % S::kTokenTiles];
  }

  // Sums as they are handed over: float4 [feature warp][unit][lane].
  __device__ __forceinline__ int place_in_tile(int unit) const {
    return (feature_warp_ * S::kUnits + unit) * 32 + lane_;
  }

  // Sums of all groups, and of the row warps.
  __device__ __forceinline__ void finish_sums() {
    finish_groups();
    if constexpr (S::kExchanges) {
      exchange_sums();
    } else if constexpr (S::kRowWarps > 1) {
      add_row_warps();
    }
  }

  // Each of the two groups gives the other half of its sums, and moves its own half, if it is the
  // second, to where own() is.
  __device__ __forceinline__ void exchange_sums() {
    constexpr int kGivenFloats = S::kTileFloats / 2;
    auto* sums = reinterpret_cast<float4*>(shared_ + S::kStages * stage_bytes_) +
                 (feature_warp_ * S::kOwnUnits * 32 + lane_);
    __syncthreads();  // what was given in the segment before is read
    auto* given = sums + row_warp_ * (kGivenFloats / 4);
    if (row_warp_ == 0) {
#pragma unroll
      for (int i = 0; i < S::kOwnUnits; ++i) given[i * 32] = to_float4(own(S::kOwnUnits + i));
    } else {
#pragma unroll
      for (int i = 0; i < S::kOwnUnits; ++i) {
        given[i * 32] = to_float4(own(i));
#pragma unroll
        for (int j = 0; j < 4; ++j) own(i)[j] = own(S::kOwnUnits + i)[j];
      }
    }
    __syncthreads();
    const auto* taken = sums + (1 - row_warp_) * (kGivenFloats / 4);
#pragma unroll
    for (int i = 0; i < S::kOwnUnits; ++i) add(own(i), taken[i * 32]);
  }

  __device__ __forceinline__ void add_row_warps() {
    ptx::copy_wait<0>();
    __syncthreads();
    auto* sums = reinterpret_cast<float4*>(shared_);
    auto* mine = sums + row_warp_ * (S::kTileFloats / 4) + place_in_tile(0);
#pragma unroll
    for (int i = 0; i < S::kUnits; ++i) mine[i * 32] = to_float4(own(i));
    __syncthreads();
    const auto* first = sums + place_in_tile(own_unit(0));
#pragma unroll
    for (int i = 0; i < S::kOwnUnits; ++i) {
      if (!is_unit(i)) continue;
#pragma unroll
      for (int r = 0; r < S::kRowWarps; ++r) {
        const float4 part = first[r * (S::kTileFloats / 4) + i * 32];
        if (r == 0) {
          set(own(i), part);
        } else {
          add(own(i), part);
        }
      }
    }
  }

  __device__ __forceinline__ static float4 to_float4(const float (&sum)[4]) {
    return make_float4(sum[0], sum[1], sum[2], sum[3]);
  }
  __device__ __forceinline__ static void set(float (&sum)[4], float4 value) {
    sum[0] = value.x;
    sum[1] = value.y;
    sum[2] = value.z;
    sum[3] = value.w;
  }
  __device__ __forceinline__ static void add(float (&sum)[4], float4 value) {
    sum[0] += value.x;
    sum[1] += value.y;
    sum[2] += value.z;
    sum[3] += value.w;
  }

  // A block leaves one part at most: of the tile that its run ends in, which is where its run starts
  // to be worked on.
  __device__ __forceinline__ float4* part_of_block(int block) const {
    return reinterpret_cast<float4*>(scratch_.partials) +
           static_cast<int64_t>(block) * (S::kTileFloats / 4) + place_in_tile(own_unit(0));
  }

  __device__ __forceinline__ void leave_part() {
    float4* part = part_of_block(blockIdx.x);
#pragma unroll
    for (int i = 0; i < S::kOwnUnits; ++i) {
      if (self().is_unit(i)) __stcg(part + i * 32, to_float4(own(i)));
    }
    __syncthreads();
    if (threadIdx.x == 0) ptx::raise_flag(scratch_.flags + blockIdx.x);
  }

  // Adds the parts of the blocks from first_block to the one before this, the nearest first. They have started before this
  // block, since blocks start in the order of their numbers, and work on this tile before all others
  // of their tail: they need not be waited for long, and wait for no later block themselves.
  __device__ __forceinline__ void add_parts(int first_block) {
    const int last = blockIdx.x - 1;
    const int parts = last - first_block + 1;
    for (int i = threadIdx.x; i < parts; i += S::kThreads) {
      ptx::take_flag(scratch_.flags + last - i);
    }
    __syncthreads();
    // As many loads at once as registers hold beside the sums: each takes most of a microsecond.
    constexpr int kUnitsAtOnce = std::min(S::kOwnUnits, 16);
    constexpr int kPartsAtOnce = std::min(16 / kUnitsAtOnce, 4);
#pragma unroll 1
    for (int i = 0; i < parts; i += kPartsAtOnce) {
#pragma unroll
      for (int u0 = 0; u0 < S::kOwnUnits; u0 += kUnitsAtOnce) {
        float4 value[kPartsAtOnce][kUnitsAtOnce];
#pragma unroll
        for (int j = 0; j < kPartsAtOnce; ++j) {
          const bool is_part = i + j < parts;
          const float4* part = part_of_block(is_part ? last - i - j : last) + u0 * 32;
#pragma unroll
          for (int u = 0; u < kUnitsAtOnce; ++u) {
            value[j][u] = is_part && self().is_unit(u0 + u) ? __ldcg(part + u * 32)
                                                            : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
          }
        }
#pragma unroll
        for (int j = 0; j < kPartsAtOnce; ++j) {
#pragma unroll
          for (int u = 0; u < kUnitsAtOnce; ++u) add(own(u0 + u), value[j][u]);
        }
      }
    }
  }

  // Of a unit of this warp.
  __device__ __forceinline__ static int unit_feature(int unit) {
    return unit / S::kTokenTiles * Layout::kStripFeatures;
  }
  __device__ __forceinline__ static int unit_token(int unit) { return unit % S::kTokenTiles * 8; }

  __device__ __forceinline__ void add_bias(const float* bias, int first_feature) {
#pragma unroll
    for (int i = 0; i < S::kOwnUnits; ++i) {
      const int feature = first_feature + unit_feature(own_unit(i)) + lane_ / 4;
      const float low = feature < w_.n ? __ldg(bias + feature) : 0.0f;
      const float high = feature + 8 < w_.n ? __ldg(bias + feature + 8) : 0.0f;
      own(i)[0] += low;
      own(i)[1] += low;
      own(i)[2] += high;
      own(i)[3] += high;
    }
  }

  const GemmProblem& p_;
  const WeightView& w_;
  const SplitScratch& scratch_;
  unsigned char* shared_;
  uint32_t ring_, ring_end_, fill_slot_;
  int stage_bytes_;
  int lane_, row_warp_, feature_warp_;
  int codes_place_, x_place_, fill_x_place_;  // of this lane, in a slice
  bool last_fill_;                            // after the segment that is filled there is none
  // Where the next copies of this warp come from.
  int fill_segment_, fill_left_, fill_chunk_, fill_group_ = 0;
  bool fill_x_on_ = true;
  uint32_t fill_codes_, fill_records_, fill_x_;
  GroupValues<T, S::kBits, S::kStrips> values_;
  float sum_[S::kStrips][S::kTokenTiles][4];
  float part_[S::kPromotes ? S::kStrips : 1][S::kTokenTiles][4];

 private:
  __device__ __forceinline__ Self& self() { return static_cast<Self&>(*this); }
  __device__ __forceinline__ const Self& self() const { return static_cast<const Self&>(*this); }
};

}  // namespace marlinq::cuda::sm80
