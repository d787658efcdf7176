// The product over experts for tiles of a few rows: codes come as fast as memory gives them where each
// warp has a stream of its own, and waits for no other.
//
// The work of a block is a run of units, 64 features of a token tile each; its warps share the chunks
// of the run evenly, each a contiguous part, with a ring, a place in the lists and copies of its rows of
// x. A unit that is cut between warps is added up at the end of the block, through shared memory, in the
// order of the warps; the one whose part comes first stores it. Where there are few units several blocks
// share one, and the last of them adds what the others left in memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/arch/sm80/expert_fill.cuh"
#include "cuda/arch/sm80/expert_output.cuh"
#include "cuda/arch/sm80/expert_tiles.cuh"
#include "cuda/arch/sm80/share.hpp"
#include "cuda/arch/sm80/tile_loop.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/flag.cuh"
#include "cuda/ptx/launch.cuh"

namespace marlinq::cuda::sm80 {

/// Each warp is a group of its own. kStages_: slices of its ring.
template <class T, int kBits, int kWarps, int kStages_>
struct ExpertStripShape : TileShape<T, kBits, 1, kWarps, 1, true> {
  static constexpr int kStages = kStages_;
  static constexpr bool kStreams = true;
};

/// What a warp keeps of a segment from when it is asked for until it is stored.
template <class S>
struct StripSegment {
  int block;  // of 64 features
  int expert;
  int chunk;  // the first
  int chunks;
  bool begins;        // with the first chunk that the block has of the unit
  bool ends;          // with the last
  int y[S::kTokens];  // row of the output; negative: none
  float weight[S::kTokens];
};

/// Shared memory beside the rings.
template <class S>
struct StripTables {
  static constexpr int kCount = S::kStages + 1;
  float4 parts[S::kRowWarps][S::kStrips][32];
  StripSegment<S> segments[S::kRowWarps][kCount];
  NearTiles near;
};

template <class S, class Rows>
class ExpertStripLoop : public ExpertFill<S, Rows, ExpertStripLoop<S, Rows>> {
  using Fill = ExpertFill<S, Rows, ExpertStripLoop<S, Rows>>;
  using Loop = TileLoop<S, ExpertStripLoop<S, Rows>>;
  friend Fill;
  friend Loop;

 public:
  using T = typename S::T;

  __device__ __forceinline__ ExpertStripLoop(const ExpertParams<Rows>& params,
                                             unsigned char* shared)
      : Fill(params, shared),
        tables_(*reinterpret_cast<StripTables<S>*>(shared + S::kStages * S::kRowWarps *
                                                                params.slice_bytes)) {
    if (!params.settled) ptx::wait_for_predecessor();
    entries_ = params.rows.bring_near(tables_.near, S::kThreads);
    share_out(entries_.tiles * params.feature_tiles.divisor);
  }

  __device__ __forceinline__ void run() {
    this->prime();
    values_.set_middle(w_);
    uint32_t stage = ring_;
    bool keeps = false;  // the first part of a unit that is not whole
    bool goes_on = true;
    for (int segment = 0; goes_on;) {
      bool stores = false;
      if (segment < found_) {
        next_table(table_);
        const StripSegment<S>& at = here();
        this->clear();
        stage = this->template multiply_chunks<1>(stage, at.chunk, at.chunks);
        this->finish_groups();
        stores = at.begins && at.ends && unit_blocks_ == 1;
        keeps = at.begins && !stores;
        if (!at.begins) leave_to_warp();
        ++segment;
      } else {
        __syncthreads();
        goes_on = false;
        if (keeps) {
          add_warps();
          stores = unit_blocks_ == 1 || meet_blocks();
        }
      }
      if (stores) {
        const StripSegment<S>& at = here();
        const int features = output_features(params_);
        ExpertOutput<T, 1, ExpertParams<Rows>>(params_, sum_, at.y, at.weight, 1)
            .store(at.block * features, (at.block + 1) * features, at.expert);
      }
    }
  }

 private:
  using Fill::params_;
  using Loop::fill_chunk_, Loop::fill_codes_, Loop::fill_left_, Loop::fill_records_,
      Loop::fill_segment_, Loop::fill_x_, Loop::fill_x_on_, Loop::fill_x_place_, Loop::group_bytes,
      Loop::lane_, Loop::p_, Loop::ring_, Loop::row_warp_, Loop::scratch_, Loop::sum_,
      Loop::values_, Loop::w_;
  static constexpr uint32_t kNoRow = 0xffffffffu;

  __device__ __forceinline__ static void next_table(int& table) {
    table = table + 1 == StripTables<S>::kCount ? 0 : table + 1;
  }
  __device__ __forceinline__ StripSegment<S>& here() const {
    return tables_.segments[row_warp_][table_];
  }
  __device__ __forceinline__ ChunkGroups groups_to_fill(int chunk) const {
    return expert_chunk_groups(params_, fill_tile_.expert, chunk);
  }
  __device__ __forceinline__ ChunkGroups groups_of(int chunk) const {
    return expert_chunk_groups(params_, here().expert, chunk);
  }

  // --- the walk ---

  // The part of this warp: `left_` chunks from `next_chunk_` of unit `next_unit_` on.
  __device__ __forceinline__ void share_out(int units) {
    const int blocks = gridDim.x;
    const int block = blockIdx.x;
    const int each = params_.blocks.divide(units);
    const int more = units - each * blocks;
    unit_blocks_ = 1;
    unit_begin_ = 0;
    unit_end_ = w_.chunks;
    int run_units = each + (block < more ? 1 : 0);
    next_unit_ = each * block + min(block, more);
    if (params_.may_cut && units * 2 <= blocks) {
      constexpr int kLeastChunks = 2 * S::kRowWarps;
      const int most = params_.share > 0 ? params_.share : kMostUnitBlocks;
      unit_blocks_ = max(min(min(blocks / max(units, 1), most), w_.chunks / kLeastChunks), 1);
      if (unit_blocks_ > 1) {
        next_unit_ = block / unit_blocks_;
        run_units = next_unit_ < units ? 1 : 0;
        const EvenShare ranges(w_.chunks, unit_blocks_);
        const int range = block - next_unit_ * unit_blocks_;
        unit_begin_ = ranges.begin(range);
        unit_end_ = unit_begin_ + ranges.size(range);
        leaves_ = range + 1 < unit_blocks_;
      }
    }
    const int unit_chunks = unit_end_ - unit_begin_;
    const EvenShare run(run_units * unit_chunks, S::kRowWarps);
    const int begin = run.begin(row_warp_);
    left_ = run.size(row_warp_);
    const int before = unit_blocks_ == 1 ? params_.chunks.divide(begin) : 0;
    next_unit_ += before;
    next_chunk_ = unit_begin_ + begin - before * unit_chunks;
    warp_chunks_ = run.least;
    larger_warps_ = run.rest;
  }

  // --- filling the ring ---

  __device__ __forceinline__ void start_fill(int /*segment*/) {
    find_weights();
    if (fill_left_ > 0) find_rows();
  }

  // The next with an expert, if there is one.
  __device__ __forceinline__ void find_weights() {
    fill_left_ = 0;
    fill_segment_ = 0;
    while (left_ > 0) {
      const int tile = params_.feature_tiles.divide(next_unit_);
      const int block = next_unit_ - tile * params_.feature_tiles.divisor;
      const int chunks = min(unit_end_ - next_chunk_, left_);
      const int chunk = next_chunk_;
      fill_tile_ = params_.rows.tile(entries_, tile, S::kTokens);
      left_ -= chunks;
      ++next_unit_;
      next_chunk_ = unit_begin_;
      if (static_cast<uint32_t>(fill_tile_.expert) < static_cast<uint32_t>(params_.num_experts)) {
        ++found_;
        next_table(fill_table_);
        set_source(block, chunk, chunks);
        return;
      }
      if (chunk == 0) {
        store_zero_rows(params_, entries_, fill_tile_, S::kTokens, block, 1, lane_, 32);
      }
    }
  }

  __device__ __forceinline__ void set_source(int block, int chunk, int chunks) {
    fill_left_ = chunks;
    fill_chunk_ = chunk;
    const WarpStrips strips(block, w_.n, params_.activates);
    const auto base = static_cast<uint32_t>(fill_tile_.expert * (params_.expert_bytes / 16));
    const int codes = strip_codes<S>(strips.lower, w_.chunks, chunk);
    constexpr int kHalf = S::kStrips / 2;
    fill_codes_ = base + codes + lane_;
    upper_codes_ =
        strip_codes<S>(strips.upper, w_.chunks, chunk) - codes - kHalf * (S::kStripBytes / 16);
    // The first lanes copy the records of the lower strips.
    const int record_pieces = w_.record_bytes / 16;
    const bool lower = lane_ < group_bytes() / 32;
    fill_records_ =
        base + lane_ +
        strip_records(lower ? strips.lower : strips.upper, w_.num_groups, record_pieces) -
        (lower ? 0 : kHalf * record_pieces);
    fill_x_ = chunk * (Layout::kChunkRows / 8) + lane_ % 8;
    StripSegment<S>& segment = tables_.segments[row_warp_][fill_table_];
    if (lane_ == 0) {
      segment.block = block;
      segment.expert = fill_tile_.expert;
      segment.chunk = chunk;
      segment.chunks = chunks;
      segment.begins = chunk == unit_begin_;
      segment.ends = chunk + chunks == unit_end_;
    }
  }

  __device__ __forceinline__ void find_rows() {
    static_assert(S::kTokens == 8, "a lane copies a piece of rows r and r + 4");
    RowPlace place;
    if (lane_ < S::kTokens) place = params_.rows.row(entries_, fill_tile_, lane_);
    const uint32_t first = place.x < 0 ? kNoRow : static_cast<uint32_t>(place.x * p_.x_stride / 8);
#pragma unroll
    for (int i = 0; i < 2; ++i) x_row_[i] = __shfl_sync(0xffffffffu, first, lane_ / 8 + i * 4);
    StripSegment<S>& segment = tables_.segments[row_warp_][fill_table_];
    if (lane_ < S::kTokens) {
      segment.y[lane_] = place.y;
      segment.weight[lane_] =
          params_.weights != nullptr && place.x >= 0 ? params_.weights[place.weight] : 1.0f;
    }
    __syncwarp();
  }

  __device__ __forceinline__ uint32_t upper_codes() const { return upper_codes_; }

  __device__ __forceinline__ void fill_x(uint32_t slot, bool on) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Row 4 of each 8 has bit 2 of its swizzle.
      const int place = i == 0 ? fill_x_place_ : fill_x_place_ ^ 64;
      ptx::copy_async_if(on && fill_x_on_ && x_row_[i] != kNoRow,
                         slot + place + i * (4 * kXRowBytes),
                         Loop::piece_at(p_.x, x_row_[i] + fill_x_));
    }
  }

  // --- units that are cut ---

  __device__ __forceinline__ void leave_to_warp() {
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
      tables_.parts[row_warp_][s][lane_] = Loop::to_float4(sum_[s][0]);
    }
  }

  // The parts of the warps after this one, up to the end of its last unit.
  __device__ __forceinline__ void add_warps() {
    const StripSegment<S>& at = here();
    int missing = unit_end_ - at.chunk - at.chunks;
    for (int warp = row_warp_ + 1; missing > 0; ++warp) {
      missing -= warp_chunks_ + (warp < larger_warps_ ? 1 : 0);
#pragma unroll
      for (int s = 0; s < S::kStrips; ++s) Loop::add(sum_[s][0], tables_.parts[warp][s][lane_]);
    }
  }

  // Leaves the sum to the last block of the unit, or adds those of the others and returns true.
  __device__ __forceinline__ bool meet_blocks() {
    float4* const part = reinterpret_cast<float4*>(scratch_.partials) +
                         static_cast<int64_t>(blockIdx.x) * (S::kTileFloats / 4) + lane_;
    if (leaves_) {
#pragma unroll
      for (int s = 0; s < S::kStrips; ++s) __stcg(part + s * 32, Loop::to_float4(sum_[s][0]));
      __syncwarp();
      if (lane_ == 0) ptx::raise_flag(scratch_.flags + blockIdx.x);
      return false;
    }
    // Blocks start in the order of their numbers, and these wait for none.
    if (lane_ + 1 < unit_blocks_) ptx::take_flag(scratch_.flags + blockIdx.x - 1 - lane_);
    __syncwarp();
#pragma unroll 2
    for (int i = 1; i < unit_blocks_; ++i) {
#pragma unroll
      for (int s = 0; s < S::kStrips; ++s) {
        Loop::add(sum_[s][0], __ldcg(part - i * (S::kTileFloats / 4) + s * 32));
      }
    }
    return true;
  }

  static constexpr int kMostUnitBlocks = 16;

  StripTables<S>& tables_;
  typename Rows::Entries entries_;
  // The walk: see share_out().
  int next_unit_;
  int next_chunk_;
  int left_;
  int unit_blocks_;            // that share a unit
  int unit_begin_, unit_end_;  // the chunks of it that this block has
  bool leaves_ = false;        // its part to another block
  int warp_chunks_, larger_warps_;
  int found_ = 0;        // segments that have been started to be filled
  int table_ = -1;       // of the segment that is multiplied
  int fill_table_ = -1;  // of the segment that is filled
  TokenTile fill_tile_;
  uint32_t x_row_[2];  // in pieces of 16 bytes
  uint32_t upper_codes_;
};

template <class S, class Rows>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksTogether)
    expert_strips(const __grid_constant__ ExpertParams<Rows> params) {
  extern __shared__ __align__(128) unsigned char shared[];
  ExpertStripLoop<S, Rows>(params, shared).run();
}

}  // namespace marlinq::cuda::sm80
