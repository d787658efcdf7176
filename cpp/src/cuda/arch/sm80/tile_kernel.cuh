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
  bool pairs;  // two 16-bit outputs may be stored at once
};

/// A range of chunks of one tile.
struct TilePosition {
  int segment = 0;
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
  }

  __device__ __forceinline__ void run() {
    TilePosition item;
    bool more = load_segment(item, 0);
    fill_at_ = item;
    start_fill(more);
    prime<true>();
    values_.set_middle(w_);
    uint32_t stage = ring_;
    while (more) {
      TilePosition next;
      const bool has_next = load_segment(next, item.segment + 1);
      if (fill_left_ <= 0 && (S::kRowWarps == 1 || !has_next)) ptx::launch_dependents();
      clear();
      quant_group_ = -1;
      int chunk = first_chunk(item);
      int left = chunks_of(item);
      for (int step = 0; step < item.length; ++step) {
        ptx::copy_wait_stage(params_.stages);
        // The slot of the step before is free after this: all warps have read it.
        __syncthreads();
        if (S::kRowWarps == 1 || left > 0) {
          multiply(stage, load_chunk_groups(w_, chunk));
        } else {
          fill(fill_slot_, fill_left_ > 0);
        }
        if (fill_left_ > 0) fill_more_records(fill_slot_);
        ptx::copy_commit();
        fill_slot_ = stage;
        stage += stage_bytes_;
        if (stage == ring_end_) stage = ring_;
        advance_fill(has_next);
        ++chunk;
        --left;
      }
      finish(item);
      more = has_next;
      item = next;
      if (S::kRowWarps > 1 && more) {
        __syncthreads();  // the sums are read
        fill_at_ = item;
        start_fill(true);
        prime<false>();
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
    at.segment = segment;
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

  // Pointers to the first chunk of the segment at fill_at_. Weights past the last block and rows of x
  // past m are not there: the last block is read again, the rows are left as they are in shared
  // memory, and neither is stored.
  __device__ __forceinline__ void start_fill(bool there) {
    if (!there) {
      fill_left_ = 0;
      return;
    }
    fill_left_ = chunks_of(fill_at_);
    fill_chunk_ = first_chunk(fill_at_);
    const int block = min(fill_at_.feature_tile * S::kFeatureWarps + feature_warp_, last_block_);
    fill_codes_ = reinterpret_cast<const unsigned char*>(w_.codes) +
                  (static_cast<int64_t>(block) * w_.chunks + fill_chunk_) * S::kBlockBytes +
                  token_warp_ * (S::kStrips / S::kTokenWarps * S::kStripBytes) + lane_ * 16;
    fill_records_ =
        w_.groups + static_cast<int64_t>(block) * w_.num_groups * group_bytes() + lane_ * 16;
    const int thread = threadIdx.x % S::kGroupThreads;
    const int row = fill_at_.token_tile * S::kTokens + thread / 8;
    fill_x_ = static_cast<const T*>(p_.x) + row * p_.x_stride +
              fill_chunk_ * Layout::kChunkRows + thread % 8 * 8;
    fill_rows_ = p_.m - row;
  }

  __device__ __forceinline__ void step_fill() {
    --fill_left_;
    ++fill_chunk_;
    fill_codes_ += S::kBlockBytes;
    fill_x_ += Layout::kChunkRows;
  }

  __device__ __forceinline__ void advance_fill(bool has_next) {
    if (fill_left_ <= 0) return;
    step_fill();
    if (fill_left_ > 0) return;
    if (S::kRowWarps == 1) start_fill(load_segment(fill_at_, fill_at_.segment + 1));
    if (fill_left_ <= 0 && (S::kRowWarps == 1 || !has_next)) ptx::launch_dependents();
  }

  // Weights do not depend on the kernel before: they are asked for before the wait for it.
  template <bool kFirst>
  __device__ __forceinline__ void prime() {
    struct XStart {
      const T* x;
      int chunk, rows;
      bool on;
    } starts[ptx::kMaxStages - 1];
    const int ahead = params_.stages - 1;
    uint32_t slot = ring_;
#pragma unroll
    for (int stage = 0; stage < ptx::kMaxStages - 1; ++stage) {
      starts[stage] = {fill_x_, fill_chunk_, fill_rows_, stage < ahead && fill_left_ > 0};
      if (starts[stage].on) {
        fill_weights(slot, true);
        fill_more_records(slot);
        step_fill();
        if (S::kRowWarps == 1 && fill_left_ <= 0) {
          start_fill(load_segment(fill_at_, fill_at_.segment + 1));
        }
      }
      slot += stage_bytes_;
    }
    if (kFirst) ptx::wait_for_predecessor();
    slot = ring_;
#pragma unroll
    for (int stage = 0; stage < ptx::kMaxStages - 1; ++stage) {
      fill_x(slot, starts[stage].x, starts[stage].chunk, starts[stage].rows, starts[stage].on);
      if (stage < ahead) ptx::copy_commit();
      slot += stage_bytes_;
    }
    fill_slot_ = ring_ + ahead * stage_bytes_;
  }

  __device__ __forceinline__ int group_bytes() const { return S::kStrips * w_.record_bytes; }
  __device__ __forceinline__ uint32_t records(uint32_t slice) const {
    return slice + S::kSliceBytes + feature_warp_ * (w_.groups_per_chunk * group_bytes());
  }

  __device__ __forceinline__ void fill(uint32_t slot, bool on) const {
    fill_weights(slot, on);
    fill_x(slot, fill_x_, fill_chunk_, fill_rows_, on);
  }

  __device__ __forceinline__ void fill_weights(uint32_t slot, bool on) const {
    constexpr int kStripsHere = S::kStrips / S::kTokenWarps;
    const uint32_t target = slot + S::kXBytes + feature_warp_ * S::kBlockBytes +
                            token_warp_ * (kStripsHere * S::kStripBytes) + lane_ * 16;
#pragma unroll
    for (int piece = 0; piece < kStripsHere * S::kPieces; ++piece) {
      ptx::copy_async_if(on, target + piece * 512, fill_codes_ + piece * 512);
    }
    const int group = load_chunk_groups(w_, fill_chunk_).first();
    ptx::copy_async_if(on && token_warp_ == 0 && lane_ * 16 < group_bytes(),
                       records(slot) + lane_ * 16,
                       fill_records_ + static_cast<int64_t>(group) * group_bytes());
  }

  // Of groups that start inside the chunk. A record of 4 strips has at most 320 bytes.
  __device__ __forceinline__ void fill_more_records(uint32_t slot) const {
    const ChunkGroups groups = load_chunk_groups(w_, fill_chunk_);
    if (!groups.changes() || token_warp_ != 0 || lane_ * 16 >= group_bytes()) return;
    for (int i = 1; i < groups.count(); ++i) {
      ptx::copy_async(records(slot) + i * group_bytes() + lane_ * 16,
                      fill_records_ + static_cast<int64_t>(groups.first() + i) * group_bytes());
    }
  }

  __device__ __forceinline__ void fill_x(uint32_t slot, const T* source, int chunk, int rows,
                                         bool on) const {
    constexpr int kRowStep = S::kGroupThreads / 8;
    static_assert(kRowStep % 8 == 0, "the swizzle repeats every 8 rows");
    const int thread = threadIdx.x % S::kGroupThreads;
    const int bytes = x_piece_bytes(p_, chunk * Layout::kChunkRows + thread % 8 * 8);
    const uint32_t target = slot + x_piece_place(thread / 8, thread % 8);
#pragma unroll
    for (int i = 0; i < S::kTokens / kRowStep; ++i) {
      ptx::copy_async_zfill_if(on && i * kRowStep < rows, target + i * (kRowStep * kXRowBytes),
                               source + i * kRowStep * p_.x_stride, bytes);
    }
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

  // Makes a group the current one and gives what the sums must be multiplied by. The first group of a
  // segment divides a scale of 0, and multiplies sums of 0 by 0.
  __device__ __forceinline__ void change_group(float (&quotient)[S::kStrips][2],
                                               uint32_t group_records) {
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
      quotient[s][0] = values_.scale[s][0];
      quotient[s][1] = values_.scale[s][1];
    }
    values_.load(group_records, w_);
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
      quotient[s][0] = ptx::divide_roughly(quotient[s][0], values_.scale[s][0]);
      quotient[s][1] = ptx::divide_roughly(quotient[s][1], values_.scale[s][1]);
    }
  }

  // Steps that start a group multiply the sums, among the products of that step, which hide it.
  enum class Starts { kNone, kFirst, kAny };

  __device__ __forceinline__ void multiply(uint32_t slice, const ChunkGroups& groups) {
    const bool first = groups.first() != quant_group_;
    quant_group_ = groups.last();
    if (groups.changes()) {
      multiply_steps<Starts::kAny>(slice, groups, first);
    } else if (first) {
      multiply_steps<Starts::kFirst>(slice, groups, true);
    } else {
      multiply_steps<Starts::kNone>(slice, groups, false);
    }
  }

  template <Starts kStarts>
  __device__ __forceinline__ void multiply_steps(uint32_t slice, const ChunkGroups& groups,
                                                 bool first) {
    constexpr int kPieceSteps = Layout::kChunkSteps / S::kPieces;
    const uint32_t codes = slice + S::kXBytes + feature_warp_ * S::kBlockBytes + lane_ * 16;
    uint32_t group_records = records(slice);
    // Two tiles of 8 tokens and 16 rows are one ldmatrix; those of the next step are on their way
    // while one is multiplied.
    const int matrix = lane_ / 8;
    const uint32_t x_row =
        slice + x_piece_place(token_warp_ * S::kTokenTiles * 8 + matrix / 2 * 8 + lane_ % 8,
                              matrix % 2);
    uint32_t x[2][S::kTokenTiles / 2][4];
    load_x(x[0], x_row, 0);
#pragma unroll
    for (int piece = 0; piece < S::kPieces; ++piece) {
      uint32_t words[S::kStrips][4];
#pragma unroll
      for (int s = 0; s < S::kStrips; ++s) {
        const uint4 q = ptx::load_shared_16(codes + s * S::kStripBytes + piece * 512);
        words[s][0] = q.x;
        words[s][1] = q.y;
        words[s][2] = q.z;
        words[s][3] = q.w;
      }
#pragma unroll
      for (int i = 0; i < kPieceSteps; ++i) {
        const int step = piece * kPieceSteps + i;
        float quotient[S::kStrips][2];
        if (kStarts == Starts::kFirst && step == 0) change_group(quotient, group_records);
        if (kStarts == Starts::kAny && (step == 0 ? first : groups.starts(step))) {
          if (step > 0) group_records += group_bytes();
          change_group(quotient, group_records);
          scale_sums(quotient);
        }
        if (step + 1 < Layout::kChunkSteps) load_x(x[(step + 1) % 2], x_row, step + 1);
        // The copies of a step to come go among the products of this one.
        if (step == 0) fill(fill_slot_, fill_left_ > 0);
#pragma unroll
        for (int s = 0; s < S::kStrips; ++s) {
          uint32_t a[4];
          decode(a, &words[s][i * S::kPieces], values_.zero[s], T());
#pragma unroll
          for (int t = 0; t < S::kTokenTiles; ++t) {
            if (kStarts == Starts::kFirst && step == 0) scale_sum(sum_[s][t], quotient[s]);
            ptx::mma_m16n8k16<T>(sum_[s][t], a, x[step % 2][t / 2][t % 2 * 2],
                                 x[step % 2][t / 2][t % 2 * 2 + 1]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ static void scale_sum(float (&sum)[4], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = __fmul_rn(sum[i], factor[i / 2]);
  }

  __device__ __forceinline__ void scale_sums(const float (&factor)[S::kStrips][2]) {
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) scale_sum(sum_[s][t], factor[s]);
    }
  }

  // The pieces of a step differ from those of step 0 in bits 5 and 6 of their place alone.
  __device__ __forceinline__ void load_x(uint32_t (&x)[S::kTokenTiles / 2][4], uint32_t row,
                                         int step) const {
#pragma unroll
    for (int pair = 0; pair < S::kTokenTiles / 2; ++pair) {
      ptx::ldmatrix_x4(x[pair], (row ^ (step * 32)) + pair * (16 * kXRowBytes));
    }
  }

  // --- the end of a segment ---

  static constexpr int kOwnTiles = S::kTokenTiles / S::kRowWarps;

  // Float4 of (strip, token tile) of a warp's part of the tile, as partial sums are stored.
  __device__ __forceinline__ int place_in_tile(int s, int t) const {
    return ((group_warp_ * S::kStrips + s) * S::kTokenTiles + t) * 32 + lane_;
  }

  __device__ __forceinline__ void finish(const TilePosition& at) {
    scale_sums(values_.scale);
    if constexpr (S::kRowWarps > 1) {
      ptx::copy_wait<0>();
      __syncthreads();
      auto* sums = reinterpret_cast<float4*>(shared_) + row_warp_ * (S::kTileFloats / 4);
#pragma unroll
      for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
        for (int t = 0; t < S::kTokenTiles; ++t) {
          sums[place_in_tile(s, t)] =
              make_float4(sum_[s][t][0], sum_[s][t][1], sum_[s][t][2], sum_[s][t][3]);
        }
      }
      __syncthreads();
    }
    const int first = at.tail_tile * w_.chunks;
    const bool whole = at.end - at.begin == w_.chunks;
    const int first_block = whole ? 0 : params_.tail.part_of(first);
    const int last_block = whole ? 0 : params_.tail.part_of(first + w_.chunks - 1);
    if (whole) {
      for_own_tiles([&](int s, int t, int i) { store(at, s, t, own_sum(s, t, i)); });
      return;
    }
    float4* mine = partial(blockIdx.x, first);
    for_own_tiles([&](int s, int t, int i) { __stcg(mine + place_in_tile(s, t), own_sum(s, t, i)); });
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
    for_own_tiles([&](int s, int t, int) {
      float4 sum = __ldcg(partial(first_block, first) + place_in_tile(s, t));
      for (int block = first_block + 1; block <= last_block; ++block) {
        const float4 part = __ldcg(partial(block, first) + place_in_tile(s, t));
        sum.x += part.x;
        sum.y += part.y;
        sum.z += part.z;
        sum.w += part.w;
      }
      store(at, s, t, sum);
    });
  }

  // Row warps share the stores: each has a part of the token tiles. f(strip, tile, i-th own tile).
  template <class F>
  __device__ __forceinline__ void for_own_tiles(F f) const {
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
      for (int i = 0; i < kOwnTiles; ++i) f(s, row_warp_ * kOwnTiles + i, i);
    }
  }

  __device__ __forceinline__ float4 own_sum(int s, int t, int i) const {
    if constexpr (S::kRowWarps == 1) {
      return make_float4(sum_[s][i][0], sum_[s][i][1], sum_[s][i][2], sum_[s][i][3]);
    } else {
      const auto* sums = reinterpret_cast<const float4*>(shared_) + place_in_tile(s, t);
      float4 sum = sums[0];
#pragma unroll
      for (int r = 1; r < S::kRowWarps; ++r) {
        const float4 part = sums[r * (S::kTileFloats / 4)];
        sum.x += part.x;
        sum.y += part.y;
        sum.z += part.z;
        sum.w += part.w;
      }
      return sum;
    }
  }

  // A block has at most two parts of tiles, at the begin and at the end of its run.
  __device__ __forceinline__ float4* partial(int block, int tile_first_unit) const {
    const int slot = 2 * block + (params_.tail.begin(block) < tile_first_unit ? 1 : 0);
    return reinterpret_cast<float4*>(params_.scratch.partials) +
           static_cast<int64_t>(slot) * (S::kTileFloats / 4);
  }

  // Features g and g + 8, tokens 2t and 2t + 1 of lane 4 g + t.
  __device__ __forceinline__ void store(const TilePosition& at, int s, int t, float4 sum) const {
    const int feature0 = (at.feature_tile * S::kFeatureWarps + feature_warp_) *
                             Layout::kBlockFeatures +
                         s * Layout::kStripFeatures;
    if (feature0 >= w_.n) return;
    const int token0 = at.token_tile * S::kTokens + (token_warp_ * S::kTokenTiles + t) * 8;
    const int g = lane_ / 4;
    const int pair = lane_ % 4 * 2;
    if (w_.bias != nullptr) {
      const float low = feature0 + g < w_.n ? __ldg(w_.bias + feature0 + g) : 0.0f;
      const float high = feature0 + g + 8 < w_.n ? __ldg(w_.bias + feature0 + g + 8) : 0.0f;
      sum.x += low;
      sum.y += low;
      sum.z += high;
      sum.w += high;
    }
    if (p_.y_type == FloatType::kF32) {
      const float value[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = token0 + pair + i % 2;
        const int feature = feature0 + g + i / 2 * 8;
        if (token < p_.m && feature < w_.n) {
          static_cast<float*>(p_.y)[token * p_.y_stride + feature] = value[i];
        }
      }
      return;
    }
    const uint32_t rows[2] = {ptx::transpose_8x8(round_pair<T>(sum.x, sum.y)),
                              ptx::transpose_8x8(round_pair<T>(sum.z, sum.w))};
    const int token = token0 + g;
    if (token >= p_.m) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int feature = feature0 + half * 8 + pair;
      auto* y = static_cast<uint16_t*>(p_.y) + token * p_.y_stride + feature;
      if (params_.pairs && feature + 1 < w_.n) {
        *reinterpret_cast<uint32_t*>(y) = rows[half];
      } else {
        if (feature < w_.n) y[0] = static_cast<uint16_t>(rows[half]);
        if (feature + 1 < w_.n) y[1] = static_cast<uint16_t>(rows[half] >> 16);
      }
    }
  }

  const TileParams& params_;
  const GemmProblem& p_;
  const WeightView& w_;
  unsigned char* shared_;
  uint32_t ring_, ring_end_, fill_slot_;
  int stage_bytes_;
  int lane_, row_warp_, group_warp_, feature_warp_, token_warp_, last_block_;
  int quant_group_;
  // Where the next copies of this warp come from.
  TilePosition fill_at_;
  int fill_left_, fill_chunk_, fill_rows_;
  const unsigned char* fill_codes_;
  const unsigned char* fill_records_;
  const T* fill_x_;
  GroupValues<T, S::kBits, S::kStrips> values_;
  float sum_[S::kStrips][S::kTokenTiles][4];
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    tile_gemm(const __grid_constant__ TileParams params) {
  extern __shared__ __align__(128) unsigned char shared[];
  TileLoop<S> loop(params, shared);
  loop.run();
}

}  // namespace marlinq::cuda::sm80
