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

/// A range of chunks of one tile, and a step of the walk through it.
struct TilePosition {
  int segment = 0;
  int feature_tile = 0;
  int token_tile = 0;
  int tail_tile = -1;  // -1: the segment is a whole tile
  int begin = 0;
  int end = 0;
  int length = 0;  // steps: chunks of a group of row warps, at most
  int step = 0;
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
    ring_ = ptx::shared_address(shared) + row_warp_ * params.slice_bytes;
    last_block_ = (w_.n + Layout::kBlockFeatures - 1) / Layout::kBlockFeatures - 1;
    last_block_strips_ = (w_.n + 15) / 16 - last_block_ * Layout::kBlockStrips;
  }

  __device__ __forceinline__ void run() {
    TilePosition item;
    bool more = load_segment(item, 0);
    TilePosition fill = item;
    bool filling = prime<true>(fill, more);
    values_.set_middle(w_);
    int stage = 0;
    while (more) {
      TilePosition next;
      const bool has_next = load_segment(next, item.segment + 1);
      if (!filling && (S::kRowWarps == 1 || !has_next)) ptx::launch_dependents();
      clear();
      quant_group_ = -1;
      ChunkGroups groups = load_chunk_groups(w_, chunk(item));
      for (; item.step < item.length; ++item.step) {
        ptx::copy_wait(params_.stages - 2);
        __syncthreads();
        // The slot of the step before is free: all warps have read it.
        if (filling) {
          const int slot = stage == 0 ? params_.stages - 1 : stage - 1;
          fill_weights(slot, fill);
          fill_x(slot, fill);
          filling = advance(fill);
          if (!filling && (S::kRowWarps == 1 || !has_next)) ptx::launch_dependents();
        }
        ptx::copy_commit();
        const ChunkGroups current = groups;
        const bool present = has_chunk(item);
        if (item.step + 1 < item.length) {
          TilePosition ahead = item;
          ++ahead.step;
          groups = load_chunk_groups(w_, chunk(ahead));
        }
        if (S::kRowWarps == 1 || present) {
          multiply(ring_ + stage * (S::kRowWarps * params_.slice_bytes), current);
        }
        stage = stage + 1 == params_.stages ? 0 : stage + 1;
      }
      finish(item);
      more = has_next;
      item = next;
      if (S::kRowWarps > 1 && more) {
        __syncthreads();  // the sums are read
        fill = item;
        filling = prime<false>(fill, true);
        stage = 0;
      }
    }
  }

 private:
  // --- the walk over segments ---

  // First chunk of a block's run, counted over all tail tiles.
  __device__ __forceinline__ int tail_begin(int block) const {
    return params_.tail.begin(block);
  }

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
    at.step = 0;
    if (segment < schedule.whole_tiles) {
      place_tile(at, segment * gridDim.x + block);
      at.tail_tile = -1;
      at.begin = 0;
      at.end = w_.chunks;
    } else {
      if (block >= schedule.tail_blocks) return false;
      const int begin = tail_begin(block);
      const int end = tail_begin(block + 1);
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

  // The chunk of this warp's group at a position; one beyond the segment's end is not there.
  __device__ __forceinline__ int chunk_unchecked(const TilePosition& at) const {
    return at.begin + row_warp_ * at.length + at.step;
  }
  __device__ __forceinline__ bool has_chunk(const TilePosition& at) const {
    return S::kRowWarps == 1 || chunk_unchecked(at) < at.end;
  }
  __device__ __forceinline__ int chunk(const TilePosition& at) const {
    return S::kRowWarps == 1 ? chunk_unchecked(at) : min(chunk_unchecked(at), w_.chunks - 1);
  }

  __device__ __forceinline__ bool advance(TilePosition& at) {
    bool more = ++at.step < at.length;
    if (S::kRowWarps == 1 && !more) more = load_segment(at, at.segment + 1);
    if (more) fill_groups_ = load_chunk_groups(w_, chunk(at));
    return more;
  }

  // --- filling the ring ---

  // Weights do not depend on the kernel before: they are asked for before the wait for it.
  template <bool kFirst>
  __device__ __forceinline__ bool prime(TilePosition& fill, bool filling) {
    TilePosition x_fill = fill;
    bool x_filling = filling;
    if (filling) fill_groups_ = load_chunk_groups(w_, chunk(fill));
    for (int stage = 0; stage + 1 < params_.stages && filling; ++stage) {
      fill_weights(stage, fill);
      filling = advance(fill);
    }
    const ChunkGroups kept = fill_groups_;
    if (kFirst) ptx::wait_for_predecessor();
    for (int stage = 0; stage + 1 < params_.stages; ++stage) {
      if (x_filling) {
        fill_x(stage, x_fill);
        x_filling = advance(x_fill);
      }
      ptx::copy_commit();
    }
    fill_groups_ = kept;
    return filling;
  }

  __device__ __forceinline__ uint32_t slice(int slot) const {
    return ring_ + slot * (S::kRowWarps * params_.slice_bytes);
  }
  __device__ __forceinline__ uint32_t records(uint32_t slice) const {
    return slice + S::kSliceBytes +
           feature_warp_ * (w_.groups_per_chunk * S::kStrips * w_.record_bytes);
  }

  __device__ __forceinline__ void fill_weights(int slot, const TilePosition& at) const {
    if (!has_chunk(at)) return;
    const int block = min(at.feature_tile * S::kFeatureWarps + feature_warp_, last_block_);
    const int strips = block == last_block_ ? last_block_strips_ : S::kStrips;
    const uint32_t* source =
        w_.codes +
        (static_cast<int64_t>(block) * S::kStrips * w_.chunks +
         static_cast<int64_t>(chunk_unchecked(at)) * strips) *
            (S::kStripBytes / 4) +
        lane_ * 4;
    const uint32_t base = slice(slot);
    const uint32_t target = base + S::kXBytes + feature_warp_ * S::kBlockBytes + lane_ * 16;
#pragma unroll
    for (int i = 0; i < S::kStrips / S::kTokenWarps; ++i) {
      const int s = token_warp_ * (S::kStrips / S::kTokenWarps) + i;
      // Strips that are not there repeat the last one; they are never stored.
      const uint32_t* from = source + min(s, strips - 1) * (S::kStripBytes / 4);
#pragma unroll
      for (int piece = 0; piece < S::kPieces; ++piece) {
        ptx::copy_async(target + s * S::kStripBytes + piece * 512, from + piece * 128);
      }
    }
    if (token_warp_ == 0) {
      const int record_block = S::kStrips * w_.record_bytes;
      const unsigned char* from =
          w_.groups +
          (static_cast<int64_t>(block) * w_.num_groups + fill_groups_.first()) * record_block;
      const uint32_t to = records(base);
      for (int byte = lane_ * 16; byte < fill_groups_.count() * record_block; byte += 512) {
        ptx::copy_async(to + byte, from + byte);
      }
    }
  }

  __device__ __forceinline__ void fill_x(int slot, const TilePosition& at) const {
    if (!has_chunk(at)) return;
    constexpr int kRowStep = S::kGroupThreads / 8;
    const int thread = threadIdx.x % S::kGroupThreads;
    const int column = chunk_unchecked(at) * Layout::kChunkRows + thread % 8 * 8;
    const int bytes = x_piece_bytes(p_, column);
    const int first = at.token_tile * S::kTokens + thread / 8;
    const T* x = static_cast<const T*>(p_.x);
    const T* source = x + first * p_.x_stride + column;
    const uint32_t target = slice(slot) + x_piece_place(thread / 8, thread % 8);
#pragma unroll
    for (int i = 0; i < S::kTokens / kRowStep; ++i) {
      const bool there = first + i * kRowStep < p_.m && bytes > 0;
      ptx::copy_async_zfill(target + i * (kRowStep * kXRowBytes),
                            there ? source + i * kRowStep * p_.x_stride : x, there ? bytes : 0);
    }
    static_assert(kRowStep % 8 == 0, "the swizzle repeats every 8 rows");
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

  // The first group of a segment divides a scale of 0, and multiplies sums of 0 by 0.
  __device__ __forceinline__ void change_group(uint32_t group_records) {
    float old[S::kStrips][2];
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
      old[s][0] = values_.scale[s][0];
      old[s][1] = values_.scale[s][1];
    }
    values_.load(group_records, w_);
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
      const float quotient[2] = {__fdividef(old[s][0], values_.scale[s][0]),
                                 __fdividef(old[s][1], values_.scale[s][1])};
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum_[s][t][i] = __fmul_rn(sum_[s][t][i], quotient[i / 2]);
      }
    }
  }

  // Groups that start inside a chunk are rare, and cost code of their own.
  __device__ __forceinline__ void multiply(uint32_t slice, const ChunkGroups& groups) {
    if (groups.first() != quant_group_) change_group(records(slice));
    quant_group_ = groups.last();
    if (groups.changes()) {
      multiply_steps<true>(slice, groups);
    } else {
      multiply_steps<false>(slice, groups);
    }
  }

  template <bool kChanges>
  __device__ __forceinline__ void multiply_steps(uint32_t slice, const ChunkGroups& groups) {
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
        if (step + 1 < Layout::kChunkSteps) load_x(x[(step + 1) % 2], x_row, step + 1);
        if (kChanges && step > 0 && groups.starts(step)) {
          group_records += S::kStrips * w_.record_bytes;
          change_group(group_records);
        }
#pragma unroll
        for (int s = 0; s < S::kStrips; ++s) {
          uint32_t a[4];
          decode(a, &words[s][i * S::kPieces], values_.zero[s], T());
#pragma unroll
          for (int t = 0; t < S::kTokenTiles; ++t) {
            ptx::mma_m16n8k16<T>(sum_[s][t], a, x[step % 2][t / 2][t % 2 * 2],
                                 x[step % 2][t / 2][t % 2 * 2 + 1]);
          }
        }
      }
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
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum_[s][t][i] = __fmul_rn(sum_[s][t][i], values_.scale[s][i / 2]);
      }
    }
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
    const int slot = 2 * block + (tail_begin(block) < tile_first_unit ? 1 : 0);
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
  uint32_t ring_;
  int lane_, row_warp_, group_warp_, feature_warp_, token_warp_;
  int last_block_, last_block_strips_;
  int quant_group_;
  ChunkGroups fill_groups_;
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
