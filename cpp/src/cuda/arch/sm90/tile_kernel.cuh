// The dense product of sm90 for many tokens: wgmma with the weights in registers.
//
// A block has a tile of features x tokens: two warpgroups that multiply, each with one or two packed
// blocks of 64 features, and a warp that fills a ring with x (a box of the tensor map), codes and group
// records, a chunk of 64 rows a stage. A warpgroup decodes the codes of one of its packed blocks while
// the products of the other run. There is one set of sums, in units of the scale of the current group:
// when a group begins they are multiplied by the quotient of the old scale and the new one.
//
// Tiles are shared among the blocks as TileSchedule says. A tile that is cut belongs to the block with its
// last chunks; the others leave their sums in global memory and raise a flag.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "cuda/arch/sm80/group_values.cuh"
#include "cuda/arch/sm80/layout.hpp"
#include "cuda/arch/sm80/output.cuh"
#include "cuda/arch/sm80/share.hpp"
#include "cuda/arch/sm80/x_tile.cuh"
#include "cuda/device/dequantize.cuh"
#include "cuda/problem.hpp"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/flag.cuh"
#include "cuda/ptx/launch.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/store.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tensor_map.hpp"

namespace marlinq::cuda::sm90 {

using sm80::Divider;
using sm80::GroupValues;
using sm80::Layout;
using sm80::TileCuts;

template <class T_, int kBits_, int kGroupBlocks_, int kTokens_>
struct TileShape {
  using T = T_;
  static constexpr int kBits = kBits_;
  static constexpr int kGroupBlocks = kGroupBlocks_;  // packed blocks of a warpgroup
  static constexpr int kTokens = kTokens_;
  static constexpr int kGroups = 2;  // warpgroups that multiply
  static constexpr int kBlocks = kGroups * kGroupBlocks;
  static constexpr int kFeatures = kBlocks * Layout::kBlockFeatures;
  static constexpr int kMultiplyThreads = kGroups * 128;
  static constexpr int kThreads = kMultiplyThreads + 128;
  static constexpr int kStripBytes = 128 * kBits;  // codes of a strip and chunk
  static constexpr int kChunkBytes = Layout::kBlockStrips * kStripBytes;
  static constexpr int kXBytes = kTokens * sm80::kXRowBytes;
  static constexpr int kStageBytes = kXBytes + kBlocks * kChunkBytes;  // without records
  static constexpr int kOutputBytes = kGroups * kTokens * Layout::kBlockFeatures * 2;
  static constexpr int kSums = kTokens / 2;  // of a thread and packed block
  static constexpr int kTileFloats = kFeatures * kTokens;
};

struct TileParams {
  TensorMap x_map;
  GemmProblem problem;
  SplitScratch scratch;
  TileSchedule schedule;
  TileCuts tail;
  int token_tiles;
  Divider band;            // by the tiles of a band of token tiles
  Divider band_widths[2];  // by the token tiles of a band; of the last band
  int stages;
  bool pairs;  // outputs are of type T, and may be stored 16 bytes at a time
};

/// A part of a tile: chunks begin to end - 1.
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
      : params_(params), chunks_(params.problem.weight.chunks) {}

  /// The parts of this block, one after the other: the tail from its last tile to its first.
  __device__ __forceinline__ bool next(TilePart& part) {
    const TileSchedule& schedule = params_.schedule;
    int tile = step_ * gridDim.x + blockIdx.x;
    part.begin = 0;
    part.end = chunks_;
    if (step_ >= schedule.whole_tiles) {
      if (blockIdx.x >= schedule.tail_blocks) return false;
      const int first = params_.tail.begin(blockIdx.x);
      const int last = params_.tail.begin(blockIdx.x + 1);
      if (step_ == schedule.whole_tiles) tail_tile_ = static_cast<unsigned>(last - 1) / chunks_;
      part.tail_tile = tail_tile_--;
      const int tile_first = part.tail_tile * chunks_;
      if (part.tail_tile < 0 || tile_first + chunks_ <= first) return false;
      tile = schedule.whole_tiles * gridDim.x + part.tail_tile;
      part.begin = max(first - tile_first, 0);
      part.end = min(last - tile_first, chunks_);
    }
    ++step_;
    const int band = params_.band.divide(tile);
    const int band_first = band * schedule.token_band;
    const int left = params_.token_tiles - band_first;
    const int within = tile - band * params_.band.divisor;
    const bool whole = left >= schedule.token_band;
    part.feature_tile = params_.band_widths[whole ? 0 : 1].divide(within);
    part.token_tile =
        band_first + within - part.feature_tile * (whole ? schedule.token_band : left);
    return true;
  }

 private:
  const TileParams& params_;
  int chunks_;
  int step_ = 0;
  int tail_tile_ = 0;
};

/// What the filling and the multiplying warps share.
template <class S>
class TileRing {
 public:
  __device__ __forceinline__ TileRing(const TileParams& params, unsigned char* shared)
      : stages_(params.stages),
        record_bytes_(Layout::kBlockStrips * params.problem.weight.record_bytes) {
    ring_ = ptx::shared_address(shared);
    output_ = ring_ + stages_ * S::kStageBytes;
    records_ = output_ + S::kOutputBytes;
    barriers_ = records_ + stages_ * S::kBlocks * record_bytes_;
  }

  __device__ __forceinline__ uint32_t x() const { return ring_ + stage_ * S::kStageBytes; }
  __device__ __forceinline__ uint32_t codes(int block) const {
    return x() + S::kXBytes + block * S::kChunkBytes;
  }
  __device__ __forceinline__ uint32_t records(int block) const {
    return records_ + (stage_ * S::kBlocks + block) * record_bytes_;
  }
  __device__ __forceinline__ uint32_t output() const { return output_; }
  __device__ __forceinline__ int record_bytes() const { return record_bytes_; }
  __device__ __forceinline__ uint32_t filled(int stage) const { return barriers_ + stage * 8; }
  __device__ __forceinline__ uint32_t emptied(int stage) const {
    return barriers_ + (stages_ + stage) * 8;
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
  int stages_, record_bytes_;
  int stage_ = 0;
  uint32_t parity_ = 0;
};

/// By one thread: fills the ring.
template <class S>
class TileFill {
 public:
  __device__ __forceinline__ TileFill(const TileParams& params, const TileRing<S>& ring)
      : params_(params), w_(params.problem.weight), ring_(ring), walk_(params) {
    policy_ = ptx::evict_first_policy();
    last_block_ = (w_.n + Layout::kBlockFeatures - 1) / Layout::kBlockFeatures - 1;
    group_chunks_ = (1 << w_.step_shift) / Layout::kChunkSteps;
  }

  __device__ __forceinline__ void run() {
    ptx::prefetch_tensor_map(params_.x_map);
    // The first stages: weights, which do not depend on the kernel before, and after the wait for it x.
    const TileRing<S> first_ring = ring_;
    more_ = walk_.next(part_);
    chunk_ = part_.begin;
    TileWalk<S> x_walk = walk_;
    TilePart x_part = part_;
    int x_chunk = chunk_;
    bool x_more = more_;
    int primed = 0;
    for (; primed < ring_.stages() && more_; ++primed) {
      fill_weights();
      step();
    }
    ptx::wait_for_predecessor();
    TileRing<S> ring = first_ring;
    for (int i = 0; i < primed; ++i) {
      fill_x(ring, x_part, x_chunk);
      ring.advance();
      if (++x_chunk == x_part.end) {
        x_more = x_walk.next(x_part);
        x_chunk = x_part.begin;
      }
    }
    while (more_) {
      ptx::barrier_wait(ring_.emptied(ring_.stage()), ring_.parity() ^ 1);
      fill_weights();
      fill_x(ring_, part_, chunk_);
      step();
    }
    ptx::launch_dependents();
  }

 private:
  __device__ __forceinline__ void step() {
    ring_.advance();
    if (++chunk_ == part_.end) {
      more_ = walk_.next(part_);
      chunk_ = part_.begin;
    }
  }

  __device__ __forceinline__ void fill_weights() const {
    const uint32_t barrier = ring_.filled(ring_.stage());
    const bool starts = chunk_ == part_.begin || chunk_ % group_chunks_ == 0;
    const int records = ring_.record_bytes();
    ptx::barrier_expect(barrier, S::kStageBytes + (starts ? S::kBlocks * records : 0));
    const int group = (chunk_ * Layout::kChunkSteps) >> w_.step_shift;
#pragma unroll
    for (int i = 0; i < S::kBlocks; ++i) {
      // Past the last block of features, which nobody stores, that is read again.
      const int64_t block = min(part_.feature_tile * S::kBlocks + i, last_block_);
      ptx::bulk_copy(ring_.codes(i),
                     reinterpret_cast<const unsigned char*>(w_.codes) +
                         (block * w_.chunks + chunk_) * S::kChunkBytes,
                     S::kChunkBytes, barrier, policy_);
      if (starts) {
        ptx::bulk_copy(ring_.records(i), w_.groups + (block * w_.num_groups + group) * records,
                       records, barrier);
      }
    }
  }

  __device__ __forceinline__ void fill_x(const TileRing<S>& ring, const TilePart& part,
                                         int chunk) const {
    ptx::tensor_copy(ring.x(), params_.x_map, chunk * Layout::kChunkRows,
                     part.token_tile * S::kTokens, ring.filled(ring.stage()));
  }

  const TileParams& params_;
  const WeightView& w_;
  TileRing<S> ring_;
  TileWalk<S> walk_;
  TilePart part_;
  uint64_t policy_;
  int chunk_, last_block_, group_chunks_;
  bool more_;
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
    group_chunks_ = (1 << w_.step_shift) / Layout::kChunkSteps;
  }

  __device__ __forceinline__ void run() {
    TileWalk<S> walk(params_);
    TilePart part;
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) {
      values_[b].set_middle(w_);
#pragma unroll
      for (int i = 0; i < S::kSums; ++i) sum_[b][i] = 0.0f;
    }
    bool waited = false;
    while (walk.next(part)) {
      multiply(part);
      // Nothing is written before the kernel before has ended.
      if (!waited) ptx::wait_for_predecessor();
      waited = true;
      finish(part);
    }
  }

 private:
  // A group of scales after the other: between them no product is under way, which the other warpgroup
  // makes use of.
  __device__ __forceinline__ void multiply(const TilePart& part) {
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) {
      values_[b].scale[0][0] = values_[b].scale[0][1] = 0.0f;
    }
    bool adds = false;
    int chunk = part.begin;
#pragma unroll 1
    do {
      const int end = min((chunk / group_chunks_ + 1) * group_chunks_, part.end);
      ptx::barrier_wait(ring_.filled(ring_.stage()), ring_.parity());
#pragma unroll
      for (int b = 0; b < S::kGroupBlocks; ++b) change_group(b);
      int previous = -1;  // the stage before, which is read until its products are done
#pragma unroll 1
      do {
        ptx::barrier_wait(ring_.filled(ring_.stage()), ring_.parity());
#pragma unroll
        for (int b = 0; b < S::kGroupBlocks; ++b) {
          // The products of the block before run on; those of this one, which used the same registers,
          // are done.
          ptx::wgmma_wait<S::kGroupBlocks - 1>();
          if (b == S::kGroupBlocks - 1) release(previous);
          decode_chunk(b);
          multiply_block(b, adds);
        }
        adds = true;
        previous = ring_.stage();
        ring_.advance();
      } while (++chunk < end);
      ptx::wgmma_wait<0>();
#pragma unroll
      for (int b = 0; b < S::kGroupBlocks; ++b) ptx::keep_in_place(sum_[b]);
      release(previous);
    } while (chunk < part.end);
  }

  __device__ __forceinline__ void release(int stage) const {
    if (lane_ == 0 && stage >= 0) ptx::barrier_arrive(ring_.emptied(stage));
  }

  __device__ __forceinline__ void change_group(int b) {
    float quotient[1][2];
    values_[b].change(ring_.records(group_ * S::kGroupBlocks + b) + warp_ * w_.record_bytes, w_,
                      quotient);
#pragma unroll
    for (int i = 0; i < S::kSums; ++i) sum_[b][i] = __fmul_rn(sum_[b][i], quotient[0][i / 2 % 2]);
  }

  __device__ __forceinline__ void decode_chunk(int b) {
    constexpr int kStepWords = S::kBits / 4;
    const uint32_t codes = ring_.codes(group_ * S::kGroupBlocks + b) + warp_ * S::kStripBytes +
                           lane_ * 16;
    uint32_t words[4 * kStepWords];
#pragma unroll
    for (int i = 0; i < kStepWords; ++i) {
      const uint4 q = ptx::load_shared_16(codes + i * 512);
      words[4 * i] = q.x;
      words[4 * i + 1] = q.y;
      words[4 * i + 2] = q.z;
      words[4 * i + 3] = q.w;
    }
#pragma unroll
    for (int step = 0; step < Layout::kChunkSteps; ++step)
      decode(fragment_[b][step], &words[step * kStepWords], values_[b].zero[0], T());
  }

  __device__ __forceinline__ void multiply_block(int b, bool adds) {
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Layout::kChunkSteps; ++step) {
      ptx::wgmma_k16<T>(sum_[b], fragment_[b][step], ptx::wgmma_operand(ring_.x() + step * 32),
                        adds || step > 0);
    }
    ptx::wgmma_commit();
  }

  // --- the end of a part ---

  __device__ __forceinline__ void meet_all() const {
    ptx::named_barrier(1, S::kMultiplyThreads);
  }
  __device__ __forceinline__ void meet_group() const { ptx::named_barrier(2 + group_, 128); }

  __device__ __forceinline__ void finish(const TilePart& part) {
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < S::kSums; ++i)
        sum_[b][i] = __fmul_rn(sum_[b][i], values_[b].scale[0][i / 2 % 2]);
    }
    if (part.end < w_.chunks) {
      leave_part();
      return;
    }
    if (part.begin > 0) add_parts(params_.tail.block_of(part.tail_tile * w_.chunks));
    store(part);
  }

  __device__ __forceinline__ float4* part_of_block(int block) const {
    return reinterpret_cast<float4*>(params_.scratch.partials) +
           static_cast<int64_t>(block) * (S::kTileFloats / 4) + threadIdx.x;
  }

  __device__ __forceinline__ void leave_part() const {
    float4* const place = part_of_block(blockIdx.x);
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < S::kSums / 4; ++i) {
        __stcg(place + (b * (S::kSums / 4) + i) * S::kMultiplyThreads,
               make_float4(sum_[b][4 * i], sum_[b][4 * i + 1], sum_[b][4 * i + 2],
                           sum_[b][4 * i + 3]));
      }
    }
    meet_all();
    if (threadIdx.x == 0) ptx::raise_flag(params_.scratch.flags + blockIdx.x);
  }

  // The nearest first. They have started before this block, since blocks start in the order of their
  // numbers, and work on this tile before all others of their tail.
  __device__ __forceinline__ void add_parts(int first_block) {
    const int last = static_cast<int>(blockIdx.x) - 1;
    for (int block = last - static_cast<int>(threadIdx.x); block >= first_block;
         block -= S::kMultiplyThreads) {
      ptx::take_flag(params_.scratch.flags + block);
    }
    meet_all();
#pragma unroll 1
    for (int block = last; block >= first_block; --block) {
      const float4* const place = part_of_block(block);
#pragma unroll
      for (int b = 0; b < S::kGroupBlocks; ++b) {
#pragma unroll
        for (int i = 0; i < S::kSums / 4; ++i) {
          const float4 value = __ldcg(place + (b * (S::kSums / 4) + i) * S::kMultiplyThreads);
          sum_[b][4 * i] += value.x;
          sum_[b][4 * i + 1] += value.y;
          sum_[b][4 * i + 2] += value.z;
          sum_[b][4 * i + 3] += value.w;
        }
      }
    }
  }

  // A lane's sums 4 j + i are feature g of its strip, of g + 8 for i of 2 and 3, and tokens 8 j + 2t and
  // 8 j + 2t + 1.
  __device__ __forceinline__ void store(const TilePart& part) {
    const int token = part.token_tile * S::kTokens;
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) {
      const int block =
          (part.feature_tile * S::kBlocks + group_ * S::kGroupBlocks + b) * Layout::kBlockFeatures;
      const int feature = block + warp_ * Layout::kStripFeatures + lane_ / 4;
      if (w_.bias != nullptr) {
        const float low = feature < w_.n ? __ldg(w_.bias + feature) : 0.0f;
        const float high = feature + 8 < w_.n ? __ldg(w_.bias + feature + 8) : 0.0f;
#pragma unroll
        for (int i = 0; i < S::kSums; ++i) sum_[b][i] += i / 2 % 2 == 0 ? low : high;
      }
      if (params_.pairs) {
        store_rows(b, token, block);
      } else if (p_.y_type == FloatType::kF32) {
        store_singles<float>(b, token, feature);
      } else if (p_.y_type == FloatType::kF16) {
        store_singles<__half>(b, token, feature);
      } else {
        store_singles<__nv_bfloat16>(b, token, feature);
      }
    }
  }

  // Through shared memory, so that a row of 64 features is written at once.
  __device__ __forceinline__ void store_rows(int b, int first_token, int first_feature) const {
    const uint32_t rows = ring_.output() + group_ * (S::kOutputBytes / S::kGroups);
    meet_group();  // the rows before have been read
#pragma unroll
    for (int j = 0; j < S::kTokens / 8; j += 2) {
      const uint32_t turned[4] = {
          sm80::round_pair<T>(sum_[b][4 * j], sum_[b][4 * j + 1]),
          sm80::round_pair<T>(sum_[b][4 * j + 2], sum_[b][4 * j + 3]),
          sm80::round_pair<T>(sum_[b][4 * j + 4], sum_[b][4 * j + 5]),
          sm80::round_pair<T>(sum_[b][4 * j + 6], sum_[b][4 * j + 7])};
      ptx::stmatrix_x4_transposed(
          rows + sm80::x_piece_place(8 * (j + lane_ / 16) + lane_ % 8, 2 * warp_ + lane_ / 8 % 2),
          turned);
    }
    meet_group();
    const int thread = threadIdx.x % 128;
    const int piece = thread % 8;
    const bool inside = first_feature + piece * 8 < w_.n;
    T* const y = static_cast<T*>(p_.y) + first_feature + piece * 8;
#pragma unroll 4
    for (int row = thread / 8; row < S::kTokens; row += 16) {
      if (inside && first_token + row < p_.m) {
        *reinterpret_cast<uint4*>(y + (first_token + row) * p_.y_stride) =
            ptx::load_shared_16(rows + sm80::x_piece_place(row, piece));
      }
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
                    y + more_tokens * p_.y_stride + more_features,
                    sm80::round_to<Y>(sum_[b][i]));
    }
  }

  const TileParams& params_;
  const GemmProblem& p_;
  const WeightView& w_;
  TileRing<S> ring_;
  int group_, warp_, lane_;
  int group_chunks_;
  GroupValues<T, S::kBits, 1> values_[S::kGroupBlocks];
  uint32_t fragment_[S::kGroupBlocks][Layout::kChunkSteps][4];
  float sum_[S::kGroupBlocks][S::kSums];
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    tile_gemm(const __grid_constant__ TileParams params) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const TileRing<S> ring(params, shared);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < ring.stages(); ++stage) {
      ptx::barrier_init(ring.filled(stage), 1);
      ptx::barrier_init(ring.emptied(stage), S::kMultiplyThreads / 32);
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();
  constexpr int kFillRegisters = 40;
  constexpr int kMultiplyRegisters = 232;
  if (threadIdx.x >= S::kMultiplyThreads) {
    ptx::give_registers<kFillRegisters>();
    if (threadIdx.x == S::kMultiplyThreads) TileFill<S>(params, ring).run();
  } else {
    ptx::take_registers<kMultiplyRegisters>();
    TileMultiply<S>(params, ring).run();
  }
}

}  // namespace marlinq::cuda::sm90
