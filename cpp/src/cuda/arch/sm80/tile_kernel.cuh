// The dense product of the sm_80 family for more than a few tokens: the loop of tile_loop.cuh over
// the tiles of a matrix.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/arch/sm80/output.cuh"
#include "cuda/arch/sm80/tile_loop.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/store.cuh"

namespace marlinq::cuda::sm80 {

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

template <class S>
class DenseTiles : public TileLoop<S, DenseTiles<S>> {
  using Loop = TileLoop<S, DenseTiles<S>>;
  friend Loop;

 public:
  using T = typename S::T;

  __device__ __forceinline__ DenseTiles(const TileParams& params, unsigned char* shared)
      : Loop(params.problem, params.scratch, shared, params.slice_bytes), params_(params) {}

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
      stage = this->template multiply_chunks<S::kTokenTiles>(stage, first_chunk(at), chunks_of(at));
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
  using Loop::add_bias, Loop::chunks_of, Loop::clear, Loop::count_fill, Loop::fill_weights,
      Loop::finish_sums, Loop::first_chunk, Loop::group_bytes, Loop::has_segment, Loop::is_unit,
      Loop::load_segment, Loop::meet_group, Loop::own, Loop::own_unit, Loop::piece_at,
      Loop::prepare_fill, Loop::step_fill, Loop::step_fill_back, Loop::unit_feature,
      Loop::unit_token;
  using Loop::feature_warp_, Loop::fill_chunk_, Loop::fill_codes_, Loop::fill_group_,
      Loop::fill_left_, Loop::fill_records_, Loop::fill_segment_, Loop::fill_slot_, Loop::fill_x_,
      Loop::fill_x_on_, Loop::fill_x_place_, Loop::lane_, Loop::last_fill_, Loop::p_, Loop::ring_,
      Loop::stage_bytes_, Loop::values_, Loop::w_;

  // --- what the loop asks for ---

  __device__ __forceinline__ const TileSchedule& schedule() const { return params_.schedule; }
  __device__ __forceinline__ const TileCuts& tail() const { return params_.tail; }
  __device__ __forceinline__ const Divider& chunk_divider() const { return params_.chunks; }

  __device__ __forceinline__ void place_tile(TilePosition& at, int tile) const {
    const int band = params_.band.divide(tile);
    const int first = band * params_.schedule.token_band;
    const int left = params_.token_tiles - first;
    const int within = tile - band * params_.band.divisor;
    const bool whole = left >= params_.schedule.token_band;
    at.feature_tile = params_.band_widths[whole ? 0 : 1].divide(within);
    at.token_tile = first + within - at.feature_tile * (whole ? params_.schedule.token_band : left);
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

  __device__ __forceinline__ static constexpr int upper_codes() { return 0; }
  __device__ __forceinline__ ChunkGroups groups_to_fill(int chunk) const {
    return load_chunk_groups(w_, chunk);
  }
  __device__ __forceinline__ ChunkGroups groups_of(int chunk) const {
    return load_chunk_groups(w_, chunk);
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

  // --- the end of a segment ---

  __device__ __forceinline__ void finish(const TilePosition& at) {
    finish_sums();
    // A tile that is cut belongs to the block that has the last of its chunks; the others leave their
    // sums to it.
    if (at.end < w_.chunks) {
      this->leave_part();
      return;
    }
    if (at.begin > 0) this->add_parts(params_.tail.block_of(at.tail_tile * w_.chunks));
    store(at);
  }

  // A lane's sums of a unit are features g and g + 8 of tokens 2t and 2t + 1.
  __device__ __forceinline__ void store(const TilePosition& at) {
    const int feature =
        (at.feature_tile * S::kFeatureWarps + feature_warp_) * Layout::kBlockFeatures;
    const int token = at.token_tile * S::kTokens;
    if (w_.bias != nullptr) add_bias(w_.bias, feature);
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
  int fill_rows_;  // of x, from the row of this thread on
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksTogether)
    tile_gemm(const __grid_constant__ TileParams params) {
  extern __shared__ __align__(128) unsigned char shared[];
  DenseTiles<S> loop(params, shared);
  loop.run();
}

}  // namespace marlinq::cuda::sm80
