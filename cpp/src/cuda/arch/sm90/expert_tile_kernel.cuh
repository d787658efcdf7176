// The product over experts for many rows of each: wgmma with the weights in registers.
//
// A block has a tile of features x tokens of one expert at a time. Two to four warpgroups multiply, each with two
// packed blocks of 64 features; of the others, a warp finds the tiles (expert_tiles.cuh), one copies codes and
// two copy rows of x, wherever they lie, and group records into a ring, a slab of two chunks a stage. More
// warpgroups hide more of each other's latency, but have fewer registers for tokens.
// There is one set of sums, in units of the scale of the current group: when a group begins they are
// multiplied by the quotient of the old scale and the new one. Where a slab has several groups, codes are
// multiplied by scales instead (code_scales.cuh).
//
// With two halves of features that meet in an activation, every other packed block of a tile is of the
// second half, so that both inputs of an output are sums of one thread.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "cuda/arch/sm80/code_scales.cuh"
#include "cuda/arch/sm80/group_values.cuh"
#include "cuda/arch/sm90/expert_output.cuh"
#include "cuda/arch/sm90/expert_tiles.cuh"
#include "cuda/arch/sm90/step_codes.cuh"
#include "cuda/device/dequantize.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/flag.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace marlinq::cuda::sm90 {

using sm80::CodeScales;
using sm80::GroupValues;

/// What the filling and the multiplying warps share.
template <class S>
class ExpertRing {
 public:
  static constexpr int kXWarps = 2;
  /// Beside the stages, with their records and barriers.
  static constexpr int kOtherBytes = S::kOutputBytes + SegmentQueue<S>::kBytes +
                                     int{sizeof(JoinedTiles)} + SegmentQueue<S>::kBarrierBytes;

  __device__ __forceinline__ ExpertRing(int stages, int slab_groups, const WeightView& w,
                                        unsigned char* shared)
      : stages_(stages),
        record_bytes_(Layout::kBlockStrips * w.record_bytes),
        slab_record_bytes_(slab_groups * record_bytes_) {
    ring_ = ptx::shared_address(shared);
    output_ = ring_ + stages_ * S::kStageBytes;
    records_ = output_ + kOtherBytes - SegmentQueue<S>::kBarrierBytes;
    barriers_ = records_ + stages_ * S::kBlocks * slab_record_bytes_;
  }

  /// By the threads that fill. What a last slab has no group for is multiplied by what lies there, and meets zeros.
  __device__ __forceinline__ void clear_records() const {
    clear_by_fillers<S>(records_, barriers_);
  }

  /// By one thread.
  __device__ __forceinline__ void init() const {
    for (int stage = 0; stage < stages_; ++stage) {
      ptx::barrier_init(filled(stage), 1 + 32 * kXWarps);
      ptx::barrier_init(emptied(stage), S::kMultiplyThreads / 32);
    }
  }

  __device__ __forceinline__ uint32_t x() const { return ring_ + stage_ * S::kStageBytes; }
  __device__ __forceinline__ uint32_t codes(int block) const {
    return x() + S::kXBytes + block * S::kBlockStageBytes;
  }
  __device__ __forceinline__ uint32_t records(int block) const {
    return records_ + (stage_ * S::kBlocks + block) * slab_record_bytes_;
  }
  __device__ __forceinline__ uint32_t output() const { return output_; }
  __device__ __forceinline__ int record_bytes() const { return record_bytes_; }
  __device__ __forceinline__ uint32_t filled(int stage) const { return barriers_ + stage * 8; }
  __device__ __forceinline__ uint32_t emptied(int stage) const {
    return barriers_ + (stages_ + stage) * 8;
  }
  __device__ __forceinline__ uint32_t queue_barriers() const { return barriers_ + stages_ * 16; }
  __device__ __forceinline__ static unsigned char* segments(unsigned char* shared, int stages) {
    return shared + stages * S::kStageBytes + S::kOutputBytes;
  }

  __device__ __forceinline__ int stage() const { return stage_; }
  __device__ __forceinline__ uint32_t parity() const { return parity_; }
  __device__ __forceinline__ void advance() {
    if (++stage_ == stages_) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

  __device__ __forceinline__ void wait_filled() const {
    ptx::barrier_wait(filled(stage_), parity_);
    ptx::fence_for_async_reads();  // rows of x
  }
  /// Also where there is nothing to fill: parity tells apart neighbouring phases only.
  __device__ __forceinline__ void wait_emptied() const {
    ptx::barrier_wait(emptied(stage_), parity_ ^ 1);
  }

 private:
  uint32_t ring_, output_, records_, barriers_;
  int stages_, record_bytes_, slab_record_bytes_;
  int stage_ = 0;
  uint32_t parity_ = 0;
};

/// Which of an expert's weights a tile has: slot s of it is packed block of().
template <class S, class Rows>
struct TileWeights {
  const ExpertTileParams<Rows>& params;

  __device__ __forceinline__ int block(int feature_tile, int slot) const {
    const WeightView& w = params.problem.weight;
    if (params.activates) {
      // Past the last there is nothing to store, and the last are read again.
      const int half = w.n / (2 * Layout::kBlockFeatures);
      return min(feature_tile * (S::kBlocks / 2) + slot / 2, half - 1) + slot % 2 * half;
    }
    const int last = (w.n + Layout::kBlockFeatures - 1) / Layout::kBlockFeatures - 1;
    return min(feature_tile * S::kBlocks + slot, last);
  }
  __device__ __forceinline__ int group(int slab) const {
    return (slab * kSlabSteps) >> params.problem.weight.step_shift;
  }
  /// A slab begins with the records of its groups.
  __device__ __forceinline__ bool has_records(int slab, int begin) const {
    return slab == begin || (slab & (params.group_slabs - 1)) == 0;
  }
  __device__ __forceinline__ int record_bytes(int slab, int bytes_of_group) const {
    return min(params.slab_groups, params.problem.weight.num_groups - group(slab)) * bytes_of_group;
  }
};

/// By one warp: copies codes.
template <class S, class Rows>
__device__ __forceinline__ void fill_codes(const ExpertTileParams<Rows>& params, ExpertRing<S> ring,
                                           SegmentQueue<S> queue) {
  const WeightView& w = params.problem.weight;
  const TileWeights<S, Rows> weights{params};
  const int lane = threadIdx.x % 32;
  for (;; queue.release()) {
    const ExpertSegment<S>& at = queue.wait();
    if (at.tokens == 0) break;
    if (at.expert < 0) continue;
    const int end = at.end;
    const unsigned char* codes =
        reinterpret_cast<const unsigned char*>(w.codes) + at.expert * params.expert_bytes +
        static_cast<int64_t>(weights.block(at.feature_tile, lane)) * w.chunks * S::kChunkBytes +
        at.begin * S::kBlockStageBytes;
#pragma unroll 1
    for (int slab = at.begin; slab < end; ++slab) {
      const uint32_t barrier = ring.filled(ring.stage());
      // Beside an odd last chunk are codes of before, which meet zeros.
      const int bytes = min(kSlabChunks, w.chunks - slab * kSlabChunks) * S::kChunkBytes;
      ring.wait_emptied();
      if (lane == 0) ptx::barrier_expect(barrier, S::kBlocks * bytes);
      if (lane < S::kBlocks) ptx::bulk_copy(ring.codes(lane), codes, bytes, barrier);
      codes += S::kBlockStageBytes;
      ring.advance();
    }
  }
  ptx::launch_dependents();
}

/// By each of ExpertRing::kXWarps warps: gathers rows of x, and group records.
template <class S, class Rows>
class ExpertGather {
 public:
  __device__ __forceinline__ ExpertGather(const ExpertTileParams<Rows>& params,
                                          const ExpertRing<S>& ring, int warp)
      : params_(params), ring_(ring) {
    // A lane has a piece of rows r, r + 8, ...
    const int row = warp * 4 + threadIdx.x % 32 / 8;
    first_row_ = row;
    piece_ = threadIdx.x % 8;
    place_ = sm80::x_piece_place(row, piece_);
    pieces_ = params.problem.x_columns / 8;
    // And pieces q, q + kRecordLanes, ... of a packed block's records.
    const int thread = warp * 32 + threadIdx.x % 32;
    record_block_ = thread / kRecordLanes;
    record_byte_ = record_block_ < S::kBlocks ? thread % kRecordLanes * 16 : kNoRecords;
  }

  // What waits for these warps is the whole block, so that what is the same for all slabs of a tile is in
  // registers.
  __device__ __forceinline__ void run(SegmentQueue<S> queue) {
    const TileWeights<S, Rows> weights{params_};
    const WeightView& w = params_.problem.weight;
    ptx::wait_for_predecessor();
    for (;; queue.release()) {
      const ExpertSegment<S>& at = queue.wait();
      if (at.tokens == 0) break;
      if (at.expert < 0) continue;
      const int begin = at.begin;
      const int end = at.end;
      const int count = at.tokens / 8;
      const uint32_t* rows = at.x + first_row_;
      uint32_t held[kHeldRows];
#pragma unroll
      for (int i = 0; i < kHeldRows; ++i) held[i] = rows[i * 8];
      const unsigned char* records =
          w.groups + at.expert * params_.expert_bytes +
          static_cast<int64_t>(weights.block(at.feature_tile, record_block_)) * w.num_groups *
              ring_.record_bytes() +
          record_byte_;
      const unsigned char* x = static_cast<const unsigned char*>(params_.problem.x) +
                               begin * kSlabRowBytes + piece_ * 16;
#pragma unroll 1
      for (int slab = begin; slab < end; ++slab) {
        ring_.wait_emptied();
        if (weights.has_records(slab, begin)) {
          copy_records(records + static_cast<uint32_t>(weights.group(slab) * ring_.record_bytes()),
                       weights.record_bytes(slab, ring_.record_bytes()));
        }
        copy_rows(held, rows, count, slab, x);
        x += kSlabRowBytes;
        ptx::barrier_arrive_after_copies(ring_.filled(ring_.stage()));
        ring_.advance();
      }
    }
  }

 private:
  static constexpr int kRecordLanes = 32 * ExpertRing<S>::kXWarps / S::kBlocks;
  static constexpr int kSlabRowBytes = kSlabChunks * sm80::kXRowBytes;  // of x in memory
  static constexpr int kNoRecords = 1 << 24;
  static constexpr int kRowsAtOnce = S::kTokens % 32 == 0 ? 4 : 2;
  static constexpr int kHeldRows = S::kTokens / 8 < 8 ? S::kTokens / 8 : 8;
  static_assert(ExpertRing<S>::kXWarps == 2, "a warp has rows r to r + 3 of each 8");

  __device__ __forceinline__ void copy_records(const unsigned char* records, int bytes) const {
    const uint32_t place = ring_.records(record_block_);
#pragma unroll 1
    for (int byte = record_byte_; byte < bytes; byte += 16 * kRecordLanes) {
      ptx::copy_async(place + byte, records);
      records += 16 * kRecordLanes;
    }
  }

  __device__ __forceinline__ void copy_rows(const uint32_t (&held)[kHeldRows], const uint32_t* rows,
                                            int count, int slab, const unsigned char* x) const {
    const int first = slab * (kSlabRowBytes / 16) + piece_;
    const bool full[kSlabChunks] = {first < pieces_, first + sm80::kXRowBytes / 16 < pieces_};
    const uint32_t place = ring_.x() + place_;
    const auto copy = [&](int i, uint32_t row) {
      const bool on = row != ExpertSegment<S>::kNoRow;
      const unsigned char* source = x + static_cast<uint64_t>(row) * 16;
      const uint32_t to = place + i * 8 * sm80::kXRowBytes;
      ptx::copy_async_or_zero_if(on, to, source, full[0]);
      ptx::copy_async_or_zero_if(on, to + S::kXTileBytes, source + sm80::kXRowBytes, full[1]);
    };
    // Without a branch between them; past the last row there is none.
#pragma unroll
    for (int i = 0; i < kHeldRows; i += kRowsAtOnce) {
      if (i >= count) return;
#pragma unroll
      for (int j = i; j < i + kRowsAtOnce; ++j) copy(j, held[j]);
    }
    if constexpr (kHeldRows < S::kTokens / 8) {
#pragma unroll 1
      for (int i = kHeldRows; i < count; i += kRowsAtOnce) {
        uint32_t next[kRowsAtOnce];
#pragma unroll
        for (int j = 0; j < kRowsAtOnce; ++j) next[j] = rows[(i + j) * 8];
#pragma unroll
        for (int j = 0; j < kRowsAtOnce; ++j) copy(i + j, next[j]);
      }
    }
  }

  const ExpertTileParams<Rows>& params_;
  ExpertRing<S> ring_;
  int first_row_, piece_, pieces_;
  int record_block_, record_byte_;
  uint32_t place_;
};

/// By a warpgroup: multiplies.
template <class S, class Rows>
class ExpertMultiply {
 public:
  using T = typename S::T;

  __device__ __forceinline__ ExpertMultiply(const ExpertTileParams<Rows>& params,
                                            const ExpertRing<S>& ring)
      : params_(params), w_(params.problem.weight), ring_(ring) {
    group_ = threadIdx.x / 128;
    warp_ = threadIdx.x / 32 % 4;
    lane_ = threadIdx.x % 32;
    codes_ = S::kXBytes + group_ * S::kGroupBlocks * S::kBlockStageBytes + warp_ * S::kStripBytes +
             lane_ * 16;
    records_ = warp_ * w_.record_bytes;
    plain_ = !w_.has_zeros && w_.scale_type == FloatType::kF16 && params.group_slabs == 1;
  }

  __device__ __forceinline__ void run(SegmentQueue<S> queue) {
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) values_[b].set_middle(w_);
    bool waited = false;
#pragma unroll 1
    for (;; queue.release()) {
      const ExpertSegment<S>& at = queue.wait();
      if (at.tokens == 0) break;
      clear_scales();
      if (at.expert >= 0) {
        multiply_as_many<S::kLeastTokens>(at);
      } else {
        clear_sums<0, S::kSums>();
      }
      // Nothing is written before the kernel before has ended.
      if (!waited) ptx::wait_for_predecessor();
      waited = true;
      finish(at);
    }
  }

 private:
  static constexpr int kStepWords = S::kBits / 4;  // of codes, a lane's

  __device__ __forceinline__ void clear_scales() {
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) {
      values_[b].scale[0][0] = values_[b].scale[0][1] = 0.0f;
    }
  }

  // As many tokens as have rows.
  template <int kTokens>
  __device__ __forceinline__ void multiply_as_many(const ExpertSegment<S>& at) {
    if constexpr (kTokens < S::kTokens) {
      if (at.tokens > kTokens) {
        multiply_as_many<std::min(kTokens + S::kTokenStep, S::kTokens)>(at);
        return;
      }
    }
    multiply_tokens<kTokens>(at);
  }

  template <int kTokens>
  __device__ __forceinline__ void multiply_tokens(const ExpertSegment<S>& at) {
    clear_sums<0, kTokens / 2>();
    if (params_.slab_groups == 4) {
      multiply_units<kTokens, 4>(at.begin, at.end);
    } else if (params_.slab_groups == 2) {
      multiply_units<kTokens, 2>(at.begin, at.end);
    } else if (plain_) {
      multiply_slabs<kTokens, Scaling<true>>(at.begin, at.end);
    } else {
      multiply_slabs<kTokens, Scaling<false>>(at.begin, at.end);
    }
    // Not before, so that products of fewer tokens have these registers.
    clear_sums<kTokens / 2, S::kSums>();
  }

  template <int kBegin, int kEnd>
  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) {
#pragma unroll
      for (int i = kBegin; i < kEnd; ++i) sum_[b][i] = 0.0f;
    }
  }

  // Slabs of so many groups.
  template <int kTokens, int kUnits>
  __device__ __forceinline__ void multiply_units(int begin, int end) {
    multiply_slabs<kTokens, Scaling<true, kUnits>>(begin, end);
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) sm80::set_scaled_units(values_[b]);
  }

  /// kPlain_: nothing is asked of a slab. kUnits_: groups of a slab whose codes are multiplied by their scales, or 0.
  template <bool kPlain_, int kUnits_ = 0>
  struct Scaling {
    static constexpr bool kPlain = kPlain_;
    static constexpr int kUnits = kUnits_;
  };

  template <int kTokens, class Scales>
  __device__ __forceinline__ void multiply_slabs(int begin, int end) {
    int slab = begin;
    // Four warpgroups hide the ends of slabs anyway, two have no registers for it, and scaled codes gain nothing by it.
    if constexpr (Scales::kPlain && Scales::kUnits == 0 && S::kGroups == 3) {
#pragma unroll 1
      for (; slab + 1 < end; slab += 2) multiply_run<kTokens, Scales, 2>(slab, begin);
      if (slab < end) multiply_run<kTokens, Scales, 1>(slab, begin);
    } else {
#pragma unroll 1
      for (; slab < end; ++slab) multiply_run<kTokens, Scales, 1>(slab, begin);
    }
  }

  // Between runs no product of the warpgroup is under way, which the others make use of.
  template <int kTokens, class Scales, int kSlabs>
  __device__ __forceinline__ void multiply_run(int first, int begin) {
    constexpr bool kPlain = Scales::kPlain;
    constexpr bool kScaled = Scales::kUnits > 0;
    uint32_t before = 0;  // the stage of the slab before
#pragma unroll
    for (int i = 0; i < kSlabs; ++i) {
      ring_.wait_filled();
      const int slab = first + i;
      const bool changes =
          !kScaled && (kPlain || slab == begin || (slab & (params_.group_slabs - 1)) == 0);
      const uint32_t x = ptx::wgmma_operand_low(ring_.x());
      const uint32_t codes = ring_.x() + codes_;
      if (changes && kFragmentSets<kTokens> > 1) {
#pragma unroll
        for (int b = 0; b < S::kGroupBlocks; ++b) {
          float quotient[2];
          load_group<kPlain>(b, quotient);
          scale_sums<kTokens>(b, quotient);
        }
      }
#pragma unroll
      for (int b = 0; b < S::kGroupBlocks; ++b) {
        float quotient[2];
        if (changes && kFragmentSets<kTokens> == 1) load_group<kPlain>(b, quotient);
#pragma unroll
        for (int chunk = 0; chunk < kSlabChunks; ++chunk) {
          constexpr int kSteps = Layout::kChunkSteps;
          const int first = chunk * kSteps;
          uint32_t words[kSteps * kStepWords];
          load_codes<kSteps>(codes + b * S::kBlockStageBytes, first, words);
          if (kFragmentSets<kTokens> == 1 && i + b > 0) {
            ptx::wgmma_wait<1>();
            if (i > 0 && chunk == 0) ptx::keep_in_place(sums<kTokens>(b));
          }
          if (i > 0 && b == 0 && chunk == 1) release(before);
          if (changes && kFragmentSets<kTokens> == 1 && chunk == 0)
            scale_sums<kTokens>(b, quotient);
          if constexpr (kScaled) {
            decode_scaled<kTokens, Scales::kUnits>(b, chunk, words);
          } else {
            decode_steps<kTokens, kSteps>(b, first, words);
          }
          ptx::wgmma_fence();
          multiply_steps<kTokens, kSteps>(b, first, x);
          ptx::wgmma_commit();
        }
      }
      before = ring_.emptied(ring_.stage());
      ring_.advance();
    }
    wait_for_products<kTokens>();
    release(before);
  }

  // The sums of the first tokens.
  template <int kTokens>
  __device__ __forceinline__ float (&sums(int b))
      [kTokens / 2] { return reinterpret_cast<float (&)[kTokens / 2]>(sum_[b]); }

  template <int kTokens>
  __device__ __forceinline__ void wait_for_products() {
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) ptx::keep_in_place(sums<kTokens>(b));
  }

  // Gives back a stage.
  __device__ __forceinline__ void release(uint32_t emptied) const {
    __syncwarp();  // all lanes have read the codes
    if (lane_ == 0) ptx::barrier_arrive(emptied);
  }

  // `quotient` is what the sums of a packed block are to be multiplied by. `kPlain`: as plain_.
  template <bool kPlain>
  __device__ __forceinline__ void load_group(int b, float (&quotient)[2]) {
    const uint32_t records = ring_.records(group_ * S::kGroupBlocks + b) + records_;
    GroupValues<T, S::kBits, 1>& values = values_[b];
    if constexpr (kPlain) {
      const uint32_t pair = ptx::load_shared_4(records + lane_ / 4 * 4);
      const float2 scale = __half22float2(reinterpret_cast<const __half2&>(pair));
      quotient[0] = ptx::divide_roughly(values.scale[0][0], scale.x);
      quotient[1] = ptx::divide_roughly(values.scale[0][1], scale.y);
      values.scale[0][0] = scale.x;
      values.scale[0][1] = scale.y;
    } else {
      values.change(records, w_, reinterpret_cast<float (&)[1][2]>(quotient));
    }
  }

  // No product of the packed block is under way.
  template <int kTokens>
  __device__ __forceinline__ void scale_sums(int b, const float (&quotient)[2]) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      sum_[b][i] = __fmul_rn(sum_[b][i], quotient[i / 2 % 2]);
    }
  }

  // Steps of a slab, all of one chunk.
  template <int kSteps>
  __device__ __forceinline__ void load_codes(uint32_t slab, int first, uint32_t* words) const {
    load_step_codes<S::kBits, kSteps>(slab + first / Layout::kChunkSteps * S::kChunkBytes,
                                      first % Layout::kChunkSteps, words);
  }

  template <int kTokens, int kSteps>
  __device__ __forceinline__ void decode_steps(int b, int first, const uint32_t* words) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      decode(fragment_[b % kFragmentSets<kTokens>][first + step], &words[step * kStepWords],
             values_[b].zero[0], T());
    }
  }

  // A chunk of a packed block.
  template <int kTokens, int kUnits>
  __device__ __forceinline__ void decode_scaled(int b, int chunk, const uint32_t* words) {
    constexpr int kUnitSteps = kSlabSteps / kUnits;
    constexpr int kOfChunk = Layout::kChunkSteps / kUnitSteps;
    const uint32_t records = ring_.records(group_ * S::kGroupBlocks + b) + records_ +
                             chunk * kOfChunk * ring_.record_bytes();
    CodeScales<T, S::kBits> scales[kOfChunk];
#pragma unroll
    for (int u = 0; u < kOfChunk; ++u) {
      scales[u].load(records + u * ring_.record_bytes(), w_.scale_type);
    }
#pragma unroll
    for (int u = 0; u < kOfChunk; ++u) {
      if (w_.has_zeros) values_[b].load_zeros(records + u * ring_.record_bytes(), w_);
#pragma unroll
      for (int step = u * kUnitSteps; step < (u + 1) * kUnitSteps; ++step) {
        auto& fragment = fragment_[b % kFragmentSets<kTokens>][chunk * Layout::kChunkSteps + step];
        decode(fragment, &words[step * kStepWords], values_[b].zero[0], T());
        scales[u].apply(fragment);
      }
    }
  }

  template <int kTokens, int kSteps>
  __device__ __forceinline__ void multiply_steps(int b, int first, uint32_t x) {
#pragma unroll
    for (int step = first; step < first + kSteps; ++step) {
      const int place =
          step / Layout::kChunkSteps * S::kXTileBytes + step % Layout::kChunkSteps * 32;
      ptx::wgmma_k16<T>(sums<kTokens>(b), fragment_[b % kFragmentSets<kTokens>][step],
                        ptx::wgmma_operand_of(x + place / 16));
    }
  }

  // --- the end of a segment ---

  __device__ __forceinline__ void meet_all() const { ptx::named_barrier(1, S::kMultiplyThreads); }

  __device__ __forceinline__ void finish(const ExpertSegment<S>& at) {
#pragma unroll
    for (int b = 0; b < S::kGroupBlocks; ++b) {
      float factor[1][2];
      values_[b].final_factors(factor);
#pragma unroll
      for (int i = 0; i < S::kSums; ++i) sum_[b][i] = __fmul_rn(sum_[b][i], factor[0][i / 2 % 2]);
    }
    if (at.end < params_.slabs) {
      leave_part();
      return;
    }
    if (at.begin > 0) add_parts(at.first_block);
    ExpertTileOutput<S, Rows>(params_, sum_, at, ring_.output()).store();
  }

  __device__ __forceinline__ void leave_part() const {
    leave_sums<S>(part_place<S>(params_.scratch, blockIdx.x), sum_);
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
      const float4* const place = part_place<S>(params_.scratch, block);
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

  const ExpertTileParams<Rows>& params_;
  const WeightView& w_;
  ExpertRing<S> ring_;
  int group_, warp_, lane_;
  uint32_t codes_;    // of this lane, in a stage
  uint32_t records_;  // of this warp, in those of a packed block
  bool plain_;        // scales are of float16, a group is a slab, and there are no zero points
  GroupValues<T, S::kBits, 1> values_[S::kGroupBlocks];
  // Two sets where there are registers for them; both packed blocks of a warpgroup share one otherwise.
  static constexpr int kMostFragmentSets = S::kGroups == 2 ? 2 : 1;
  template <int kTokens>
  static constexpr int kFragmentSets = kTokens <= 128 ? kMostFragmentSets : 1;
  uint32_t fragment_[kMostFragmentSets][kSlabSteps][4];
  float sum_[S::kGroupBlocks][S::kSums];
};

template <class S, class Rows>
__global__ void __launch_bounds__(S::kThreads, 1)
    expert_tiles(const __grid_constant__ ExpertTileParams<Rows> params) {
  extern __shared__ __align__(1024) unsigned char shared[];
  constexpr int kXWarps = ExpertRing<S>::kXWarps;
  const ExpertRing<S> ring(params.stages, params.slab_groups, params.problem.weight, shared);
  unsigned char* const segments = ExpertRing<S>::segments(shared, params.stages);
  const SegmentQueue<S> queue(segments, ring.queue_barriers());
  if (threadIdx.x >= S::kMultiplyThreads &&
      (params.problem.weight.num_groups & (params.slab_groups - 1)) != 0) {
    ring.clear_records();
  }
  if (threadIdx.x == 0) {
    ring.init();
    queue.init(S::kMultiplyThreads / 32 + 1 + kXWarps);
    ptx::barrier_init_fence();
  }
  __syncthreads();
  if (!params.settled) ptx::wait_for_predecessor();
  if (threadIdx.x < 128) params.rows.prefetch(blockIdx.x, params.feature_tiles);
  if (threadIdx.x >= S::kMultiplyThreads) {
    ptx::give_registers<S::kFillRegisters>();
    const int role = threadIdx.x / 32 - S::kMultiplyThreads / 32;
    if (role == 0) fill_codes<S, Rows>(params, ring, queue);
    if (role == 1) {
      auto& joined = *reinterpret_cast<JoinedTiles*>(segments + SegmentQueue<S>::kBytes);
      SegmentLister<S, Rows>(params, queue, joined).run();
    }
    if (role >= 2) ExpertGather<S, Rows>(params, ring, role - 2).run(queue);
  } else {
    ptx::take_registers<S::kMultiplyRegisters>();
    ExpertMultiply<S, Rows>(params, ring).run(queue);
  }
}

}  // namespace marlinq::cuda::sm90
