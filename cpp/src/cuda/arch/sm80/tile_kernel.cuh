// The dense product of the sm_80 family for more than a few tokens.
//
// A block computes tiles of kFeatureWarps * 64 features x kTokens tokens; a warp holds 64 features x
// kTokenTiles * 8 tokens of it in registers, so that a decoded weight fragment serves all of them and
// an ldmatrix of x serves 4 fragments. kRowWarps groups of warps share K, and add their sums at the
// end through shared memory. Blocks walk over segments of tiles (TileSchedule); a tile cut between
// blocks is put together by the block that finishes last, which adds all parts in the order of K.
//
// Scales: one set of accumulators, in units of the current group's scale. When the group changes
// they are multiplied by the quotient of the two scales: as exact as adding scaled sums, at the same
// cost, with half of the registers. Layout guarantees that no scale is 0, WeightView::scales_divide
// that no quotient overflows.
//
// Shared memory: a stage is one slice for each group of row warps,
//   [x tile, 128-byte rows][codes][group records of each feature warp]
// filled by that group with cp.async. The ring is primed once: with one group of row warps it goes on
// into the next segment while the last one is stored; otherwise the sums need its room.
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
#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/launch.cuh"
#include "cuda/ptx/mma.cuh"

namespace marlinq::cuda::sm80 {

template <class T_, int kBits_, int kFeatureWarps_, int kTokenWarps_, int kRowWarps_,
          int kTokenTiles_>
struct TileShape {
  using T = T_;
  static constexpr int kBits = kBits_;
  static constexpr int kFeatureWarps = kFeatureWarps_;
  static constexpr int kTokenWarps = kTokenWarps_;
  static constexpr int kRowWarps = kRowWarps_;
  static constexpr int kTokenTiles = kTokenTiles_;  // of a warp
  static constexpr int kStrips = Layout::kBlockStrips;
  static constexpr int kGroupWarps = kFeatureWarps * kTokenWarps;  // that share a slice
  static constexpr int kGroupThreads = kGroupWarps * 32;
  static constexpr int kThreads = kGroupThreads * kRowWarps;
  static constexpr int kFeatures = kFeatureWarps * Layout::kBlockFeatures;
  static constexpr int kTokens = kTokenWarps * kTokenTiles * 8;
  static constexpr int kTileFloats = kFeatures * kTokens;
  // Blocks that share a multiprocessor: what registers allow.
  static constexpr int kBlocksTogether = kThreads > 128 ? 1 : (kTokenTiles > 4 ? 2 : 3);
  static constexpr int kPieces = kBits / 4;
  static constexpr int kStripBytes = kPieces * 512;  // codes of a strip and chunk
  static constexpr int kBlockBytes = kStrips * kStripBytes;
  static constexpr int kXBytes = kTokens * kXRowBytes;
  static constexpr int kSliceBytes = kXBytes + kFeatureWarps * kBlockBytes;  // without records
  // Sums of all warps, when several share K.
  static constexpr int kSumBytes = kRowWarps > 1 ? kRowWarps * kTileFloats * 4 : 0;
  static_assert(kTokenTiles % 2 == 0 && kTokenTiles % kRowWarps == 0);
  static_assert(kStrips % kTokenWarps == 0);
};

struct TileParams {
  GemmProblem problem;
  SplitScratch scratch;
  TileSchedule schedule;
  EvenShare tail;  // chunks of the tail tiles over the tail blocks
  int feature_tiles;
  int token_tiles;
  int stages;
  int slice_bytes;
  int scales_place;  // of the scales that threads keep, after the ring: 32 bytes each
  bool pairs;  // outputs of 16 bits, which may be stored two at a time
};

/// A range of chunks of one tile.
struct TilePosition {
  int feature_tile = 0;
  int token_tile = 0;
  int tail_tile = -1;  // -1: the segment is a whole tile
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
    row_warp_ = warp / S::kGroupWarps;
    group_warp_ = warp % S::kGroupWarps;
    feature_warp_ = group_warp_ / S::kTokenWarps;
    token_warp_ = group_warp_ % S::kTokenWarps;
    stage_bytes_ = S::kRowWarps * params.slice_bytes;
    ring_ = ptx::shared_address(shared) + row_warp_ * params.slice_bytes;
    ring_end_ = ring_ + params.stages * stage_bytes_;
    last_block_ = (w_.n + Layout::kBlockFeatures - 1) / Layout::kBlockFeatures - 1;
    codes_place_ = S::kXBytes + feature_warp_ * S::kBlockBytes + lane_ * 16;
    x_place_ = x_piece_place(
        token_warp_ * S::kTokenTiles * 8 + lane_ / 16 * 8 + lane_ % 8, lane_ / 8 % 2);
    const int thread = threadIdx.x % S::kGroupThreads;
    fill_x_place_ = x_piece_place(thread / 8, thread % 8);
    scales_ = ptx::shared_address(shared) + params.scales_place + threadIdx.x * 16;
  }

  __device__ __forceinline__ void run() {
    int segment = 0;
    bool more = prime<true>(segment);
    values_.set_middle(w_);
    uint32_t stage = ring_;
    while (more) {
      TilePosition at;
      const bool last_fill = S::kRowWarps == 1 || !load_segment(at, segment + 1);
      if (fill_left_ <= 0 && last_fill) ptx::launch_dependents();
      clear();
      quant_group_ = -1;
      load_segment(at, segment);
      int steps = at.length;
      int chunk = first_chunk(at);
      const int end = chunk + chunks_of(at);
      ptx::copy_wait_stage(params_.stages);
      // The slot of the step before is free after this: all warps have read it.
      __syncthreads();
      if (S::kRowWarps == 1 || chunk < end) load_first(stage);
#pragma unroll 1
      for (; steps > 0; --steps) {
        const bool present = S::kRowWarps == 1 || chunk < end;
        if (present) {
          multiply_head(stage, load_chunk_groups(w_, chunk));
        } else {
          fill(fill_slot_, fill_left_ > 0);
        }
        if (fill_left_ > 0) {
          fill_rest(fill_slot_);
          step_fill();
          if (fill_left_ <= 0 && last_fill) ptx::launch_dependents();
        }
        ptx::copy_commit();
        fill_slot_ = stage;
        stage += stage_bytes_;
        if (stage == ring_end_) stage = ring_;
        ++chunk;
        const bool next = steps > 1 && (S::kRowWarps == 1 || chunk < end);
        if (steps > 1) {
          ptx::copy_wait_stage(params_.stages);
          __syncthreads();  // as above
        }
        if (present) multiply_tail(stage, next);
      }
      // Where the segment lies is worked out again: registers are short in the loop.
      ptx::forget_value_of(segment);
      load_segment(at, segment);
      finish(at);
      ++segment;
      if (S::kRowWarps == 1) {
        more = load_segment(at, segment);
      } else {
        __syncthreads();  // the sums are read
        more = prime<false>(segment);
        stage = ring_;
      }
    }
  }

 private:
  // --- the walk over segments ---

  __device__ __forceinline__ void place_tile(TilePosition& at, int tile) const {
    const int per_band = params_.feature_tiles * params_.schedule.token_band;
    const int first = tile / per_band * params_.schedule.token_band;
    const int width = min(params_.schedule.token_band, params_.token_tiles - first);
    const int within = tile % per_band;
    at.feature_tile = within / width;
    at.token_tile = first + within % width;
  }

  __device__ __forceinline__ bool load_segment(TilePosition& at, int segment) const {
    const TileSchedule& schedule = params_.schedule;
    const int block = blockIdx.x;
    if (segment < schedule.whole_tiles) {
      place_tile(at, segment * gridDim.x + block);
      at.tail_tile = -1;
      at.begin = 0;
      at.end = w_.chunks;
    } else {
      if (block >= schedule.tail_blocks) return false;
      const int begin = params_.tail.begin(block);
      const int end = params_.tail.begin(block + 1);
      at.tail_tile = begin / w_.chunks + segment - schedule.whole_tiles;
      const int first = at.tail_tile * w_.chunks;
      if (first >= end) return false;
      place_tile(at, schedule.whole_tiles * gridDim.x + at.tail_tile);
      at.begin = max(begin - first, 0);
      at.end = min(end - first, w_.chunks);
    }
    at.length = (at.end - at.begin + S::kRowWarps - 1) / S::kRowWarps;
    return true;
  }

  // The chunks of this warp's group in a segment.
  __device__ __forceinline__ int first_chunk(const TilePosition& at) const {
    return at.begin + row_warp_ * at.length;
  }
  __device__ __forceinline__ int chunks_of(const TilePosition& at) const {
    return min(at.length, at.end - first_chunk(at));
  }

  // --- filling the ring ---

  // Pointers to the first chunk of a segment. Weights past the last block and rows of x past m are not
  // there: the last block is read again, the rows are left as they are in shared memory, and neither
  // is stored.
  __device__ __forceinline__ bool start_fill(int segment) {
    TilePosition at;
    fill_segment_ = segment;
    fill_left_ = 0;
    if (!load_segment(at, segment)) return false;
    fill_left_ = chunks_of(at);
    fill_chunk_ = first_chunk(at);
    const int block = min(at.feature_tile * S::kFeatureWarps + feature_warp_, last_block_);
    const int64_t codes = (static_cast<int64_t>(block) * w_.chunks + fill_chunk_) * S::kBlockBytes +
                          token_warp_ * (S::kStrips / S::kTokenWarps * S::kStripBytes);
    fill_codes_ = static_cast<uint32_t>(codes / 16) + lane_;
    fill_records_ = static_cast<uint32_t>(static_cast<int64_t>(block) * w_.num_groups *
                                          group_bytes() / 16) +
                    lane_;
    const int thread = threadIdx.x % S::kGroupThreads;
    const int row = at.token_tile * S::kTokens + thread / 8;
    fill_x_ = static_cast<uint32_t>((row * p_.x_stride + fill_chunk_ * Layout::kChunkRows) / 8) +
              thread % 8;
    fill_rows_ = p_.m - row;
    return true;
  }

  __device__ __forceinline__ void step_fill() {
    --fill_left_;
    ++fill_chunk_;
    fill_codes_ += S::kBlockBytes / 16;
    fill_x_ += Layout::kChunkRows / 8;
    if (S::kRowWarps == 1 && fill_left_ == 0) start_fill(fill_segment_ + 1);
  }

  // The first stages of a walk that starts at a segment: weights, which do not depend on the kernel
  // before, and after the wait for it the rows of x.
  template <bool kFirst>
  __device__ __forceinline__ bool prime(int segment) {
    const int ahead = params_.stages - 1;
    bool there = false;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      there = start_fill(segment);
      fill_slot_ = ring_;
      if (kFirst && pass == 1) ptx::wait_for_predecessor();
#pragma unroll 1
      for (int stage = 0; stage < ahead; ++stage) {
        if (fill_left_ > 0) {
          if (pass == 0) {
            fill_weights(fill_slot_, true);
          } else {
            fill_x(fill_slot_, true);
            fill_rest(fill_slot_);
          }
          step_fill();
        }
        if (pass == 1) ptx::copy_commit();
        fill_slot_ += stage_bytes_;
      }
    }
    return there;
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
    constexpr int kStripsHere = S::kStrips / S::kTokenWarps;
    const uint32_t target = slot + codes_place_ + token_warp_ * (kStripsHere * S::kStripBytes);
    const uint4* source = piece_at(w_.codes, fill_codes_);
#pragma unroll
    for (int piece = 0; piece < kStripsHere * S::kPieces; ++piece) {
      ptx::copy_async_if(on, target + piece * 512, source + piece * 32);
    }
    const int group = load_chunk_groups(w_, fill_chunk_).first();
    ptx::copy_async_if(on && token_warp_ == 0 && lane_ * 16 < group_bytes(),
                       records(slot) + lane_ * 16, record_source(group));
  }

  __device__ __forceinline__ void fill_x(uint32_t slot, bool on) const {
    constexpr int kRowStep = S::kGroupThreads / 8;
    static_assert(kRowStep % 8 == 0, "the swizzle repeats every 8 rows");
    const bool there =
        on && fill_chunk_ * Layout::kChunkRows + threadIdx.x % 8 * 8 < p_.x_columns;
    const uint4* source = piece_at(p_.x, fill_x_);
    const int64_t step = kRowStep * p_.x_stride / 8;
#pragma unroll
    for (int i = 0; i < S::kTokens / kRowStep; ++i) {
      ptx::copy_async_if(there && i * kRowStep < fill_rows_,
                         slot + fill_x_place_ + i * (kRowStep * kXRowBytes), source + i * step);
    }
  }

  // What few steps have: groups that start inside the chunk, columns that x does not have. A group's
  // records of 4 strips have at most 320 bytes, so a lane copies 16.
  __device__ __forceinline__ void fill_rest(uint32_t slot) const {
    const ChunkGroups groups = load_chunk_groups(w_, fill_chunk_);
    if (groups.changes() && token_warp_ == 0 && lane_ * 16 < group_bytes()) {
#pragma unroll 1
      for (int i = 1; i < groups.count(); ++i) {
        ptx::copy_async(records(slot) + i * group_bytes() + lane_ * 16,
                        record_source(groups.first() + i));
      }
    }
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
    keep_scales();
  }

  __device__ __forceinline__ void scale_sums(const float (&factor)[S::kStrips][2]) {
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum_[s][t][i] = __fmul_rn(sum_[s][t][i], factor[s][i / 2]);
      }
    }
  }

  // The scales of the current group wait in shared memory for the next: registers are short.
  __device__ __forceinline__ void keep_scales() const {
    ptx::store_shared_16(scales_, bits(values_.scale[0], values_.scale[1]));
    ptx::store_shared_16(scales_ + S::kThreads * 16, bits(values_.scale[2], values_.scale[3]));
  }
  __device__ __forceinline__ void fetch_scales() {
    const uint4 low = ptx::load_shared_16(scales_);
    const uint4 high = ptx::load_shared_16(scales_ + S::kThreads * 16);
    const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) values_.scale[i / 2][i % 2] = __uint_as_float(words[i]);
  }
  __device__ __forceinline__ static uint4 bits(const float (&a)[2], const float (&b)[2]) {
    return make_uint4(__float_as_uint(a[0]), __float_as_uint(a[1]), __float_as_uint(b[0]),
                      __float_as_uint(b[1]));
  }

  __device__ __forceinline__ void change_group(uint32_t group_records) {
    fetch_scales();
    float quotient[S::kStrips][2];
    values_.change(group_records, w_, quotient);
    keep_scales();
    scale_sums(quotient);
  }

  // The product of a chunk, steps 0 to 3 of strips 0 to 3, in two parts: between them all warps meet,
  // and the second part loads what the next chunk starts with. By then all reads of this chunk's
  // slice are done: the first strip of the last step has used the last of x.
  static constexpr int kPieceSteps = Layout::kChunkSteps / S::kPieces;
  static constexpr int kLastStep = Layout::kChunkSteps - 1;
  static constexpr int kPairs = S::kTokenTiles / 2;

  __device__ __forceinline__ void load_first(uint32_t slice) {
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) load_x(true, slice, pair, 0);
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) load_codes(true, slice, s, 0);
  }

  // Groups that start inside a chunk are rare, and cost code of their own.
  __device__ __forceinline__ void multiply_head(uint32_t slice, const ChunkGroups& groups) {
    if (groups.first() != quant_group_) change_group(records(slice));
    quant_group_ = groups.last();
    if (groups.changes()) {
      multiply_head_steps<true>(slice, groups);
    } else {
      multiply_head_steps<false>(slice, groups);
    }
  }

  template <bool kChanges>
  __device__ __forceinline__ void multiply_head_steps(uint32_t slice, const ChunkGroups& groups) {
    uint32_t group_records = records(slice);
    decode_strip(0, 0);
    // The copies of a step to come go among the products of this one.
    fill(fill_slot_, fill_left_ > 0);
#pragma unroll
    for (int step = 0; step < kLastStep; ++step) {
#pragma unroll
      for (int s = 0; s < S::kStrips; ++s) {
        multiply_strip<kChanges>(step, s, groups, group_records, [&](int pair) {
          if (s + 1 == S::kStrips) load_x(true, slice, pair, step + 1);
        });
        if (step + 1 < kLastStep && (step + 1) % kPieceSteps == 0) {
          // The codes of the next piece follow as soon as those of a strip are decoded: each strip's
          // are while the one before it is multiplied.
          if (s == 0) load_codes(true, slice, 0, (step + 1) / kPieceSteps);
          if (s + 1 < S::kStrips) load_codes(true, slice, s + 1, (step + 1) / kPieceSteps);
        }
      }
    }
    multiply_strip<kChanges>(kLastStep, 0, groups, group_records, [](int) {});
  }

  __device__ __forceinline__ void multiply_tail(uint32_t next_slice, bool next) {
    const ChunkGroups none{0};
    uint32_t unused = 0;
#pragma unroll
    for (int s = 1; s < S::kStrips; ++s) {
      multiply_strip<false>(kLastStep, s, none, unused, [&](int pair) {
        if (s + 1 == S::kStrips) load_x(next, next_slice, pair, 0);
      });
      if (s == 1) {
#pragma unroll
        for (int done = 0; done < 3; ++done) load_codes(next, next_slice, done, 0);
      }
    }
    load_codes(next, next_slice, 3, 0);
  }

  // Strip s of a step; the fragment of the strip after it is decoded while this one is multiplied.
  // f(pair): after a pair of token tiles.
  template <bool kChanges, class F>
  __device__ __forceinline__ void multiply_strip(int step, int s, const ChunkGroups& groups,
                                                 uint32_t& group_records, F f) {
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        ptx::mma_m16n8k16<T>(sum_[s][2 * pair + half], a_[s % 2], x_[pair][2 * half],
                             x_[pair][2 * half + 1]);
      }
      f(pair);
      if (pair == 0) {
        if (s + 1 < S::kStrips) {
          decode_strip(step, s + 1);
        } else if (step < kLastStep) {
          if (!kChanges) decode_strip(step + 1, 0);
        }
      }
    }
    if (kChanges && s + 1 == S::kStrips && step < kLastStep) {
      if (groups.starts(step + 1)) {
        group_records += group_bytes();
        change_group(group_records);
      }
      decode_strip(step + 1, 0);
    }
  }

  __device__ __forceinline__ void decode_strip(int step, int s) {
    decode(a_[s % 2], &words_[s][step % kPieceSteps * S::kPieces], values_.zero[s], T());
  }

  // Codes of a strip and piece.
  __device__ __forceinline__ void load_codes(bool on, uint32_t slice, int s, int piece) {
    ptx::load_shared_16_if(on, words_[s], slice + codes_place_ + s * S::kStripBytes + piece * 512);
  }

  // Two tiles of 8 tokens and 16 rows are one ldmatrix. The pieces of a step differ from those of step
  // 0 in bits 5 and 6 of their place alone.
  __device__ __forceinline__ void load_x(bool on, uint32_t slice, int pair, int step) {
    ptx::ldmatrix_x4_if(on, x_[pair],
                        ((slice + x_place_) ^ (step * 32)) + pair * (16 * kXRowBytes));
  }

  // --- the end of a segment ---

  // Row warps share the stores: each has a part of the token tiles.
  static constexpr int kOwnTiles = S::kTokenTiles / S::kRowWarps;
  using Strip = float[kOwnTiles][4];

  // Float4 of a strip's first own token tile, as sums are stored: [group warp][strip][tile][lane].
  __device__ __forceinline__ int place_in_tile(int s) const {
    return ((group_warp_ * S::kStrips + s) * S::kTokenTiles + row_warp_ * kOwnTiles) * 32 + lane_;
  }

  __device__ __forceinline__ void finish(const TilePosition& at) {
    fetch_scales();
    scale_sums(values_.scale);
    const bool whole = at.end - at.begin == w_.chunks;
    const int first_unit = at.tail_tile * w_.chunks;
    float4* mine = whole ? nullptr : part_of_block(blockIdx.x, first_unit);
    if constexpr (S::kRowWarps == 1) {
#pragma unroll
      for (int s = 0; s < S::kStrips; ++s) {
        if (whole) {
          store_strip(at, s, sum_[s]);
        } else {
          leave_strip(mine + place_in_tile(s), sum_[s]);
        }
      }
    } else {
      leave_for_row_warps();
#pragma unroll 1
      for (int s = 0; s < S::kStrips; ++s) {
        Strip sum;
        const float4* sums = reinterpret_cast<const float4*>(shared_) + place_in_tile(s);
#pragma unroll
        for (int r = 0; r < S::kRowWarps; ++r) {
          add_strip(sum, r == 0, [&](int t) { return sums[r * (S::kTileFloats / 4) + t * 32]; });
        }
        if (whole) {
          store_strip(at, s, sum);
        } else {
          leave_strip(mine + place_in_tile(s), sum);
        }
      }
    }
    if (!whole) add_parts(at, first_unit);
  }

  __device__ __forceinline__ void leave_for_row_warps() {
    ptx::copy_wait<0>();
    __syncthreads();
    auto* sums = reinterpret_cast<float4*>(shared_) + row_warp_ * (S::kTileFloats / 4) +
                 group_warp_ * (S::kStrips * S::kTokenTiles * 32) + lane_;
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
        sums[(s * S::kTokenTiles + t) * 32] =
            make_float4(sum_[s][t][0], sum_[s][t][1], sum_[s][t][2], sum_[s][t][3]);
      }
    }
    __syncthreads();
  }

  // sum += part(t) for every own token tile t.
  template <class F>
  __device__ __forceinline__ static void add_strip(Strip& sum, bool first, F part) {
#pragma unroll
    for (int t = 0; t < kOwnTiles; ++t) {
      const float4 value = part(t);
      sum[t][0] = first ? value.x : sum[t][0] + value.x;
      sum[t][1] = first ? value.y : sum[t][1] + value.y;
      sum[t][2] = first ? value.z : sum[t][2] + value.z;
      sum[t][3] = first ? value.w : sum[t][3] + value.w;
    }
  }

  __device__ __forceinline__ static void leave_strip(float4* target, const Strip& sum) {
#pragma unroll
    for (int t = 0; t < kOwnTiles; ++t) {
      __stcg(target + t * 32, make_float4(sum[t][0], sum[t][1], sum[t][2], sum[t][3]));
    }
  }

  // A block has at most two parts of tiles, at the begin and at the end of its run.
  __device__ __forceinline__ float4* part_of_block(int block, int tile_first_unit) const {
    const int slot = 2 * block + (params_.tail.begin(block) < tile_first_unit ? 1 : 0);
    return reinterpret_cast<float4*>(params_.scratch.partials) +
           static_cast<int64_t>(slot) * (S::kTileFloats / 4);
  }

  // All blocks of a tile have left their parts in scratch memory, or will: the last one adds them, in
  // the order of K, and stores.
  __device__ __forceinline__ void add_parts(const TilePosition& at, int first_unit) {
    const int first_block = params_.tail.part_of(first_unit);
    const int last_block = params_.tail.part_of(first_unit + w_.chunks - 1);
    __syncthreads();
    __shared__ bool last;
    if (threadIdx.x == 0) {
      __threadfence();
      const uint32_t before = atomicAdd(params_.scratch.counters + at.tail_tile, 1u);
      last = before == static_cast<uint32_t>(last_block - first_block);
      if (last) params_.scratch.counters[at.tail_tile] = 0;
      __threadfence();
    }
    __syncthreads();
    if (!last) return;
    // As many loads at once as registers hold: each waits for most of a microsecond.
    constexpr int kLoads = 32;
    constexpr int kStripsAtOnce = kOwnTiles <= 4 ? S::kStrips : S::kStrips / 2;
    constexpr int kParts = kLoads / (kStripsAtOnce * kOwnTiles);
#pragma unroll 1
    for (int s0 = 0; s0 < S::kStrips; s0 += kStripsAtOnce) {
      Strip sum[kStripsAtOnce] = {};
#pragma unroll 1
      for (int block = first_block; block <= last_block; block += kParts) {
        float4 part[kParts][kStripsAtOnce][kOwnTiles];
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
          const bool there = block + i <= last_block;
          const float4* from =
              part_of_block(there ? block + i : block, first_unit) + place_in_tile(s0);
#pragma unroll
          for (int s = 0; s < kStripsAtOnce; ++s) {
#pragma unroll
            for (int t = 0; t < kOwnTiles; ++t) {
              part[i][s][t] = there ? __ldcg(from + (s * S::kTokenTiles + t) * 32)
                                    : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
#pragma unroll
          for (int s = 0; s < kStripsAtOnce; ++s) {
            add_strip(sum[s], false, [&](int t) { return part[i][s][t]; });
          }
        }
      }
#pragma unroll
      for (int s = 0; s < kStripsAtOnce; ++s) store_strip(at, s0 + s, sum[s]);
    }
  }

  // A lane's sums are features g and g + 8 of tokens 2t and 2t + 1. Pairs of 16-bit outputs are
  // turned to features 2t and 2t + 1 of token g.
  __device__ __forceinline__ void store_strip(const TilePosition& at, int s, const Strip& sum) const {
    const int feature0 = (at.feature_tile * S::kFeatureWarps + feature_warp_) *
                             Layout::kBlockFeatures +
                         s * Layout::kStripFeatures;
    const int token0 = at.token_tile * S::kTokens +
                       (token_warp_ * S::kTokenTiles + row_warp_ * kOwnTiles) * 8;
    const int g = lane_ / 4;
    const int pair = lane_ % 4 * 2;
    if (!params_.pairs) {
#pragma unroll
      for (int t = 0; t < kOwnTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          store_output_if(p_, token0 + t * 8 + pair + i % 2, feature0 + g + i / 2 * 8, sum[t][i]);
        }
      }
      return;
    }
    float low = 0.0f;
    float high = 0.0f;
    if (w_.bias != nullptr) {
      if (feature0 + g < w_.n) low = __ldg(w_.bias + feature0 + g);
      if (feature0 + g + 8 < w_.n) high = __ldg(w_.bias + feature0 + g + 8);
    }
    auto* y = static_cast<uint16_t*>(p_.y) + (token0 + g) * p_.y_stride + feature0 + pair;
    const int tokens = p_.m - token0 - g;
    const bool there[2] = {feature0 + pair < w_.n, feature0 + pair + 8 < w_.n};
#pragma unroll
    for (int t = 0; t < kOwnTiles; ++t) {
      const uint32_t rows[2] = {
          ptx::transpose_8x8(round_pair<T>(sum[t][0] + low, sum[t][1] + low)),
          ptx::transpose_8x8(round_pair<T>(sum[t][2] + high, sum[t][3] + high))};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (t * 8 < tokens && there[half]) *reinterpret_cast<uint32_t*>(y + half * 8) = rows[half];
      }
      y += 8 * p_.y_stride;
    }
  }

  const TileParams& params_;
  const GemmProblem& p_;
  const WeightView& w_;
  unsigned char* shared_;
  uint32_t ring_, ring_end_, fill_slot_;
  int stage_bytes_;
  int lane_, row_warp_, group_warp_, feature_warp_, token_warp_, last_block_;
  int codes_place_, x_place_, fill_x_place_;  // of this lane, in a slice
  uint32_t scales_;
  int quant_group_;
  // Where the next copies of this warp come from.
  int fill_segment_, fill_left_, fill_chunk_, fill_rows_;
  uint32_t fill_codes_, fill_records_, fill_x_;
  GroupValues<T, S::kBits, S::kStrips> values_;
  float sum_[S::kStrips][S::kTokenTiles][4];
  // Fragments of x for the step at hand, codes of the piece at hand, and the fragments of the strip at
  // hand and the one after it.
  uint32_t x_[S::kTokenTiles / 2][4];
  uint32_t words_[S::kStrips][4];
  uint32_t a_[2][4];
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksTogether)
    tile_gemm(const __grid_constant__ TileParams params) {
  extern __shared__ __align__(128) unsigned char shared[];
  TileLoop<S> loop(params, shared);
  loop.run();
}

}  // namespace marlinq::cuda::sm80
