// The dense product of the sm_80 family for more than a few tokens.
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
// that no quotient overflows.
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

#include "cuda/arch/sm80/group_values.cuh"
#include "cuda/arch/sm80/layout.hpp"
#include "cuda/arch/sm80/output.cuh"
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
#include "cuda/ptx/store.cuh"

namespace marlinq::cuda::sm80 {

template <class T_, int kBits_, int kFeatureWarps_, int kRowWarps_, int kTokenTiles_>
struct TileShape {
  using T = T_;
  static constexpr int kBits = kBits_;
  static constexpr int kFeatureWarps = kFeatureWarps_;
  static constexpr int kRowWarps = kRowWarps_;
  static constexpr int kTokenTiles = kTokenTiles_;  // of a warp
  static constexpr int kStrips = Layout::kBlockStrips;
  static constexpr int kGroupThreads = kFeatureWarps * 32;  // that share a slice
  static constexpr int kThreads = kGroupThreads * kRowWarps;
  static constexpr int kFeatures = kFeatureWarps * Layout::kBlockFeatures;
  static constexpr int kTokens = kTokenTiles * 8;
  static constexpr int kTileFloats = kFeatures * kTokens;
  // Blocks that share a multiprocessor: what registers allow.
  static constexpr int kBlocksTogether = kThreads > 128 ? 1 : (kTokenTiles > 4 ? 2 : 3);
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
  static_assert(kTokenTiles % 2 == 0);
};

struct TileParams {
  GemmProblem problem;
  SplitScratch scratch;
  TileSchedule schedule;
  TileCuts tail;
  Divider chunks;
  int feature_tiles;
  int token_tiles;
  Divider band;            // by the tiles of a band of token tiles
  Divider band_widths[2];  // by the token tiles of a band; of the last band
  int slice_bytes;
  bool pairs;  // outputs are of type T, and may be stored two at a time
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

template <class S>
class TileLoop {
 public:
  using T = typename S::T;

  __device__ __forceinline__ TileLoop(const TileParams& params, unsigned char* shared)
      : params_(params), p_(params.problem), w_(params.problem.weight), shared_(shared) {
    const int warp = threadIdx.x / 32;
    lane_ = threadIdx.x % 32;
    row_warp_ = warp / S::kFeatureWarps;
    feature_warp_ = warp % S::kFeatureWarps;
    stage_bytes_ = S::kRowWarps * params.slice_bytes;
    ring_ = ptx::shared_address(shared) + row_warp_ * params.slice_bytes;
    ring_end_ = ring_ + S::kStages * stage_bytes_;
    codes_place_ = S::kXBytes + feature_warp_ * S::kBlockBytes + lane_ * 16;
    x_place_ = x_piece_place(lane_ / 16 * 8 + lane_ % 8, lane_ / 8 % 2);
    const int thread = threadIdx.x % S::kGroupThreads;
    fill_x_place_ = x_piece_place(thread / 8, thread % 8);
    // The loop is to hold these in registers, not to work them out for every chunk.
    ptx::forget_origin(codes_place_);
    ptx::forget_origin(x_place_);
    ptx::forget_origin(fill_x_place_);
    ptx::forget_origin(stage_bytes_);
  }

  __device__ __forceinline__ void run() {
    int segment = 0;
    bool more = has_segment(segment);
    prime<true>(segment);
    values_.set_middle(w_);
    uint32_t stage = ring_;
    while (more) {
      TilePosition at;
      load_segment(at, segment);
      clear();
      stage = multiply_chunks(stage, first_chunk(at), chunks_of(at));
      // All warps meet as often as those with most chunks: racecheck counts barriers, and takes the
      // next one of the block for another one else.
      for (int i = chunks_of(at); S::kRowWarps > 1 && i < at.length; ++i) meet_group();
      // Where the segment lies is worked out again: registers are short in the loop.
      ptx::forget_origin(segment);
      load_segment(at, segment);
      finish(at);
      ++segment;
      more = has_segment(segment);
      if (!S::kStreams) {
        __syncthreads();  // the sums are read
        prime<false>(segment);
        stage = ring_;
      }
    }
  }

 private:
  // The next stage is there; the slot of the one before is free, as all warps of the group have read
  // it.
  __device__ __forceinline__ void meet_group() const {
    ptx::copy_wait<S::kStages - 2>();
    if constexpr (S::kRowWarps == 1) {
      __syncthreads();
    } else {
      ptx::named_barrier(1 + row_warp_, S::kGroupThreads);
    }
  }

  // --- the walk over segments ---

  __device__ __forceinline__ void place_tile(TilePosition& at, int tile) const {
    const int band = params_.band.divide(tile);
    const int first = band * params_.schedule.token_band;
    const int left = params_.token_tiles - first;
    const int within = tile - band * params_.band.divisor;
    const bool whole = left >= params_.schedule.token_band;
    at.feature_tile = params_.band_widths[whole ? 0 : 1].divide(within);
    at.token_tile = first + within - at.feature_tile * (whole ? params_.schedule.token_band : left);
  }

  // The segments of a block: its whole tiles, then its run of tail tiles, the last of them first.
  __device__ __forceinline__ int tail_tile(int segment) const {
    return params_.chunks.divide(params_.tail.begin(blockIdx.x + 1) - 1) -
           (segment - params_.schedule.whole_tiles);
  }

  __device__ __forceinline__ bool has_segment(int segment) const {
    if (segment < params_.schedule.whole_tiles) return true;
    return blockIdx.x < params_.schedule.tail_blocks &&
           (tail_tile(segment) + 1) * w_.chunks > params_.tail.begin(blockIdx.x);
  }

  // Of one that there is.
  __device__ __forceinline__ void load_segment(TilePosition& at, int segment) const {
    const TileSchedule& schedule = params_.schedule;
    int tile = segment * gridDim.x + blockIdx.x;
    at.begin = 0;
    at.end = w_.chunks;
    if (segment >= schedule.whole_tiles) {
      at.tail_tile = tail_tile(segment);
      tile = schedule.whole_tiles * gridDim.x + at.tail_tile;
      const int first = at.tail_tile * w_.chunks;
      at.begin = max(params_.tail.begin(blockIdx.x) - first, 0);
      at.end = min(params_.tail.begin(blockIdx.x + 1) - first, w_.chunks);
    }
    place_tile(at, tile);
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

  // Pointers to the first chunk of a segment. Weights past the last block and rows of x past m are not
  // there: the last block is read again, the rows are left as they are in shared memory, and neither
  // is stored.
  __device__ __forceinline__ void start_fill(int segment) {
    TilePosition at;
    fill_left_ = 0;
    for (;; ++segment) {
      fill_segment_ = segment;
      if (!has_segment(segment)) return;
      load_segment(at, segment);
      fill_left_ = chunks_of(at);
      // A group of row warps may have no chunk of a segment.
      if (S::kRowWarps == 1 || !S::kStreams || fill_left_ > 0) break;
    }
    fill_chunk_ = first_chunk(at);
    const int last_block = (w_.n + Layout::kBlockFeatures - 1) / Layout::kBlockFeatures - 1;
    const int block = min(at.feature_tile * S::kFeatureWarps + feature_warp_, last_block);
    const int64_t codes = (static_cast<int64_t>(block) * w_.chunks + fill_chunk_) * S::kBlockBytes;
    fill_codes_ = static_cast<uint32_t>(codes / 16) + lane_;
    fill_records_ =
        static_cast<uint32_t>(static_cast<int64_t>(block) * w_.num_groups * group_bytes() / 16) +
        lane_;
    const int thread = threadIdx.x % S::kGroupThreads;
    const int row = at.token_tile * S::kTokens + thread / 8;
    fill_x_ = static_cast<uint32_t>((row * p_.x_stride + fill_chunk_ * Layout::kChunkRows) / 8) +
              thread % 8;
    fill_rows_ = p_.m - row;
  }

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
    if (S::kStreams) start_fill(fill_segment_ + 1);
    if (fill_left_ <= 0 && last_fill_) ptx::launch_dependents();
  }

  // What the next chunk to be filled is like: the group that it starts with; the columns of x that it
  // has for this thread. And, with few of them, groups that start inside the chunk and columns that
  // x does not have. Returns for how many chunks the same holds.
  __device__ __forceinline__ int prepare_fill(uint32_t slot) {
    fill_x_on_ = true;
    if (w_.chunk_shift >= 0 && fill_chunk_ != missing_chunk()) {
      return fill_chunk_ < missing_chunk() ? missing_chunk() - fill_chunk_ : INT_MAX;
    }
    fill_rest(slot);
    return 1;
  }
  __device__ __forceinline__ int missing_chunk() const {
    return p_.x_columns % Layout::kChunkRows == 0 ? -1 : p_.x_columns / Layout::kChunkRows;
  }

  // The first stages of a walk that starts at a segment: weights, which do not depend on the kernel
  // before, and after the wait for it the rows of x.
  template <bool kFirst>
  __device__ __forceinline__ void prime(int segment) {
    constexpr int kAhead = S::kStages - 1;
    last_fill_ = S::kStreams || !has_segment(segment + 1);
    start_fill(segment);
    int steps = 0;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      if (pass == 1) {
        if (fill_segment_ == segment) {
          step_fill_back(steps);
        } else {
          start_fill(segment);
        }
        if (kFirst) ptx::wait_for_predecessor();
      }
      fill_slot_ = ring_;
#pragma unroll 1
      for (int stage = 0; stage < kAhead; ++stage) {
        if (fill_left_ > 0) {
          if (pass == 0) {
            fill_group_ = load_chunk_groups(w_, fill_chunk_).first();
            fill_weights(fill_slot_, true);
          } else {
            prepare_fill(fill_slot_);
            fill_x(fill_slot_, true);
          }
          step_fill();
          count_fill(1);
          ++steps;
        }
        if (pass == 1) ptx::copy_commit();
        fill_slot_ += stage_bytes_;
      }
    }
  }

  __device__ __forceinline__ int group_bytes() const { return S::kStrips * w_.record_bytes; }
  __device__ __forceinline__ uint32_t records(uint32_t slice) const {
    return slice + S::kSliceBytes + feature_warp_ * (w_.groups_per_chunk * group_bytes());
  }

  __device__ __forceinline__ void fill(uint32_t slot, bool on) const {
    fill_weights(slot, on);
    fill_x(slot, on);
  }

  // Sources are counted in pieces of 16 bytes: half of the registers of pointers.
  __device__ __forceinline__ static const uint4* piece_at(const void* base, uint32_t piece) {
    return static_cast<const uint4*>(base) + piece;
  }
  __device__ __forceinline__ const uint4* record_source(int group) const {
    return piece_at(w_.groups, fill_records_ + group * (group_bytes() / 16));
  }

  __device__ __forceinline__ void fill_weights(uint32_t slot, bool on) const {
    const uint32_t target = slot + codes_place_;
    const uint4* source = piece_at(w_.codes, fill_codes_);
#pragma unroll
    for (int piece = 0; piece < S::kStrips * S::kPieces; ++piece) {
      ptx::copy_async_if(on, target + piece * 512, source + piece * 32);
    }
    const int group = w_.chunk_shift >= 0 ? fill_chunk_ >> w_.chunk_shift : fill_group_;
    ptx::copy_async_if(on && lane_ * 16 < group_bytes(), records(slot) + lane_ * 16,
                       record_source(group));
  }

  __device__ __forceinline__ void fill_x(uint32_t slot, bool on) const {
    constexpr int kRowStep = S::kGroupThreads / 8;
    static_assert(kRowStep % 8 == 0, "the swizzle repeats every 8 rows");
    const bool there = on && fill_x_on_;
    const uint4* source = piece_at(p_.x, fill_x_);
    const int64_t step = kRowStep * p_.x_stride / 8;
#pragma unroll
    for (int i = 0; i < S::kTokens / kRowStep; ++i) {
      ptx::copy_async_if(there && i * kRowStep < fill_rows_,
                         slot + fill_x_place_ + i * (kRowStep * kXRowBytes), source + i * step);
    }
  }

  // A group's records of 4 strips have at most 320 bytes, so a lane copies 16.
  __device__ __forceinline__ void fill_rest(uint32_t slot) {
    const ChunkGroups groups = load_chunk_groups(w_, fill_chunk_);
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
        for (int i = 0; i < 4; ++i) sum_[s][t][i] = 0.0f;
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

  __device__ __forceinline__ void change_group(uint32_t group_records) {
    float quotient[S::kStrips][2];
    values_.change(group_records, w_, quotient);
    scale_sums(quotient);
  }

  // The product of `left` chunks, the first of them in `stage`; returns the stage after them. What
  // may differ from chunk to chunk is settled for runs of chunks: branches are dear beside so few
  // instructions.
  __device__ __forceinline__ uint32_t multiply_chunks(uint32_t stage, int chunk, int left) {
    int quant_group = -1;
    int change_run = 0;  // chunks before the next that a group may start in
    int fill_run = 0;    // chunks for which the filling of stages is settled
    int filled = 0;
#pragma unroll 1
    for (; left > 0; --left) {
      meet_group();
      if (fill_run == 0) {
        if (filled > 0) count_fill(filled);
        filled = 0;
        fill_run = left;
        if (fill_left_ > 0) {
          fill_run = min(left, min(fill_left_, prepare_fill(fill_slot_)));
          filled = fill_run;
        }
      }
      --fill_run;
      const bool fills = filled > 0;
      ChunkGroups groups{0};
      bool same_group = true;
      if (change_run == 0) {
        groups = load_chunk_groups(w_, chunk);
        change_run = next_change(w_, chunk) - chunk;
        same_group = groups.first() == quant_group;
        quant_group = groups.last();
      }
      --change_run;
      ++chunk;
      float quotient[S::kStrips][2];
      if (same_group && !groups.changes()) {
        multiply_steps<Change::kNone>(stage, groups, quotient, fills);
      } else {
        values_.change(records(stage), w_, quotient);
        if (!groups.changes()) {
          multiply_steps<Change::kFirst>(stage, groups, quotient, fills);
        } else {
          scale_sums(quotient);
          multiply_steps<Change::kAny>(stage, groups, quotient, fills);
        }
      }
      stage = step_ring(stage);
    }
    if (filled > 0) count_fill(filled);
    return stage;
  }

  __device__ __forceinline__ uint32_t step_ring(uint32_t stage) {
    ptx::copy_commit();
    step_fill();
    fill_slot_ = stage;
    stage += stage_bytes_;
    return stage == ring_end_ ? ring_ : stage;
  }

  // Where groups may start: at no step, at the first, at any.
  enum class Change { kNone, kFirst, kAny };

  // `quotient`: for kFirst, by which sums are to be multiplied before the first products, here because
  // products hide it.
  template <Change kChange>
  __device__ __forceinline__ void multiply_steps(uint32_t slice, const ChunkGroups& groups,
                                                 const float (&quotient)[S::kStrips][2],
                                                 bool fills) {
    constexpr int kPieceSteps = Layout::kChunkSteps / S::kPieces;
    constexpr int kPairs = S::kTokenTiles / 2;
    const uint32_t codes = slice + codes_place_;
    uint32_t group_records = records(slice);
    // Two tiles of 8 tokens and 16 rows are one ldmatrix. Those of the next step follow into the same
    // registers as soon as the last strip of a step has used them.
    const uint32_t x_row = slice + x_place_;
    uint32_t x[kPairs][4];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) load_x(x[pair], x_row, pair, 0);
    uint32_t words[S::kStrips][4];
    load_codes(words, codes, 0);
    uint32_t a[2][4];
    decode(a[0], &words[0][0], values_.zero[0], T());
    if (kChange == Change::kFirst) scale_units(0, 0, S::kTokenTiles, quotient);
    // The copies of a step to come go among the products of this one.
    fill(fill_slot_, fills);
#pragma unroll
    for (int step = 0; step < Layout::kChunkSteps; ++step) {
      if (kChange == Change::kAny && step > 0 && groups.starts(step)) {
        group_records += group_bytes();
        change_group(group_records);
        // The zero points are new.
        decode(a[0], &words[0][step % kPieceSteps * S::kPieces], values_.zero[0], T());
      }
#pragma unroll
      for (int s = 0; s < S::kStrips; ++s) {
        const bool last_strip = s + 1 == S::kStrips;
        const int next_step = last_strip ? step + 1 : step;
        const int next_strip = last_strip ? 0 : s + 1;
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            ptx::mma_m16n8k16<T>(sum_[s][2 * pair + half], a[s % 2], x[pair][2 * half],
                                 x[pair][2 * half + 1]);
          }
          if (last_strip && next_step < Layout::kChunkSteps) {
            load_x(x[pair], x_row, pair, next_step);
          }
          // The next fragment is decoded, and the next sums scaled, while this one is multiplied.
          if (kChange == Change::kFirst && step == 0 && !last_strip) {
            scale_units(next_strip, 2 * pair, 2, quotient);
          }
          if (pair == 0 && next_step < Layout::kChunkSteps) {
            if (last_strip && next_step % kPieceSteps == 0) {
              load_codes(words, codes, next_step / kPieceSteps);
            }
            decode(a[(s + 1) % 2], &words[next_strip][next_step % kPieceSteps * S::kPieces],
                   values_.zero[next_strip], T());
          }
        }
      }
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

  __device__ __forceinline__ void finish(const TilePosition& at) {
    scale_sums(values_.scale);
    if constexpr (S::kExchanges) {
      exchange_sums();
    } else if constexpr (S::kRowWarps > 1) {
      add_row_warps();
    }
    // A tile that is cut belongs to the block that has the last of its chunks; the others leave their
    // sums to it.
    if (at.end < w_.chunks) {
      leave_part();
      return;
    }
    if (at.begin > 0) add_parts(at.tail_tile * w_.chunks);
    store(at);
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
    return reinterpret_cast<float4*>(params_.scratch.partials) +
           static_cast<int64_t>(block) * (S::kTileFloats / 4) + place_in_tile(own_unit(0));
  }

  __device__ __forceinline__ void leave_part() {
    float4* part = part_of_block(blockIdx.x);
#pragma unroll
    for (int i = 0; i < S::kOwnUnits; ++i) {
      if (is_unit(i)) __stcg(part + i * 32, to_float4(own(i)));
    }
    __syncthreads();
    if (threadIdx.x == 0) ptx::raise_flag(params_.scratch.flags + blockIdx.x);
  }

  // Adds the parts of the blocks before this one, the nearest first. They have started before this
  // block, since blocks start in the order of their numbers, and work on this tile before all others
  // of their tail: they need not be waited for long, and wait for no later block themselves.
  __device__ __forceinline__ void add_parts(int first_chunk_of_tile) {
    const int last = blockIdx.x - 1;
    const int parts = last - params_.tail.block_of(first_chunk_of_tile) + 1;
    for (int i = threadIdx.x; i < parts; i += S::kThreads) {
      ptx::take_flag(params_.scratch.flags + last - i);
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
            value[j][u] = is_part && is_unit(u0 + u) ? __ldcg(part + u * 32)
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

  // A lane's sums of a unit are features g and g + 8 of tokens 2t and 2t + 1.
  __device__ __forceinline__ void store(const TilePosition& at) {
    const int feature =
        (at.feature_tile * S::kFeatureWarps + feature_warp_) * Layout::kBlockFeatures;
    const int token = at.token_tile * S::kTokens;
    if (w_.bias != nullptr) add_bias(feature);
    if (params_.pairs) {
      store_pairs(token, feature);
    } else if (p_.y_type == FloatType::kF32) {
      store_singles<float>(token, feature);
    } else if (p_.y_type == FloatType::kF16) {
      store_singles<__half>(token, feature);
    } else {
      store_singles<__nv_bfloat16>(token, feature);
    }
  }

  // Of a unit of this warp.
  __device__ __forceinline__ static int unit_feature(int unit) {
    return unit / S::kTokenTiles * Layout::kStripFeatures;
  }
  __device__ __forceinline__ static int unit_token(int unit) { return unit % S::kTokenTiles * 8; }

  __device__ __forceinline__ void add_bias(int first_feature) {
#pragma unroll
    for (int i = 0; i < S::kOwnUnits; ++i) {
      const int feature = first_feature + unit_feature(own_unit(i)) + lane_ / 4;
      const float low = feature < w_.n ? __ldg(w_.bias + feature) : 0.0f;
      const float high = feature + 8 < w_.n ? __ldg(w_.bias + feature + 8) : 0.0f;
      own(i)[0] += low;
      own(i)[1] += low;
      own(i)[2] += high;
      own(i)[3] += high;
    }
  }

  // Two features at a time: turned so that a lane has 2t and 2t + 1 of token g, and those 8 on.
  __device__ __forceinline__ void store_pairs(int first_token, int first_feature) {
    const int token = first_token + lane_ / 4;
    const int feature = first_feature + lane_ % 4 * 2;
    auto* y = static_cast<uint16_t*>(p_.y) + token * p_.y_stride + feature;
    const int tokens = p_.m - token;
    const int features = w_.n - feature;
#pragma unroll
    for (int i = 0; i < S::kOwnUnits; ++i) {
      const int unit = own_unit(i);
      const auto& sum = own(i);
      const uint32_t rows[2] = {ptx::transpose_8x8(round_pair<T>(sum[0], sum[1])),
                                ptx::transpose_8x8(round_pair<T>(sum[2], sum[3]))};
      auto* place = y + unit_token(unit) * p_.y_stride + unit_feature(unit);
      const bool there = is_unit(i) && unit_token(unit) < tokens;
      ptx::store_if(there && unit_feature(unit) < features, place, rows[0]);
      ptx::store_if(there && unit_feature(unit) + 8 < features, place + 8, rows[1]);
    }
  }

  template <class Y>
  __device__ __forceinline__ void store_singles(int first_token, int first_feature) {
    const int token = first_token + lane_ % 4 * 2;
    const int feature = first_feature + lane_ / 4;
    auto* y = static_cast<Y*>(p_.y) + token * p_.y_stride + feature;
    const int tokens = p_.m - token;
    const int features = w_.n - feature;
#pragma unroll
    for (int i = 0; i < S::kOwnUnits; ++i) {
      const int unit = own_unit(i);
      auto* place = y + unit_token(unit) * p_.y_stride + unit_feature(unit);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        ptx::store_if(is_unit(i) && unit_token(unit) + j % 2 < tokens &&
                          unit_feature(unit) + j / 2 * 8 < features,
                      place + (j % 2) * p_.y_stride + j / 2 * 8, round_to<Y>(own(i)[j]));
      }
    }
  }

  const TileParams& params_;
  const GemmProblem& p_;
  const WeightView& w_;
  unsigned char* shared_;
  uint32_t ring_, ring_end_, fill_slot_;
  int stage_bytes_;
  int lane_, row_warp_, feature_warp_;
  int codes_place_, x_place_, fill_x_place_;  // of this lane, in a slice
  bool last_fill_;                            // after the segment that is filled there is none
  // Where the next copies of this warp come from.
  int fill_segment_, fill_left_, fill_chunk_, fill_rows_, fill_group_ = 0;
  bool fill_x_on_ = true;
  uint32_t fill_codes_, fill_records_, fill_x_;
  GroupValues<T, S::kBits, S::kStrips> values_;
  float sum_[S::kStrips][S::kTokenTiles][4];
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksTogether)
    tile_gemm(const __grid_constant__ TileParams params) {
  extern __shared__ __align__(128) unsigned char shared[];
  TileLoop<S> loop(params, shared);
  loop.run();
}

}  // namespace marlinq::cuda::sm80
