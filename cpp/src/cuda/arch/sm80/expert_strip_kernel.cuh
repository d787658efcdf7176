// The product over experts for tiles of a few rows: codes come as fast as memory gives them where each
// warp has a stream of its own, and waits for no other.
//
// The work of a block is a run of units, 64 features of a token tile each; its warps share the chunks
// of the run evenly, each a contiguous part, with a ring, a place in the lists and copies of its rows of
// x. A unit that is cut between warps is added up at the end of the block, through shared memory, in the
// order of the warps, by the one whose part comes first. Where whole units would leave blocks uneven
// those share the chunks of all units evenly too: all blocks of a unit but the last leave their sum in
// memory, and the last adds them.
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
template <class T, int kBits, int kWarps, int kStages_, TileGroups kGroups>
struct ExpertStripShape : TileShape<T, kBits, 1, kWarps, 1, true, kGroups> {
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
  int y[S::kTokens];  // row of the output; negative: none
  float weight[S::kTokens];
};

/// The chunks of all units, those of each one after the other, in runs, one for each block.
struct StripRuns {
  int total;
  int size;
  int larger;  // of the first runs have ...
  int more;    // ... so many more

  __device__ __forceinline__ int begin(int block) const {
    return min(block * size + min(block, larger) * more, total);
  }
};

/// Shared memory beside the rings.
template <class S>
struct StripTables {
  static constexpr int kCount = S::kStages + 1;
  float4 parts[S::kRowWarps][S::kStrips][32];
  StripSegment<S> segments[S::kRowWarps][kCount];
  StripSegment<S> parked;  // of parts[0]
  StripRuns runs;
  NearTiles near;
};

/// kCuts: units may be cut between blocks, where ExpertPlan::may_cut is set.
template <class S, class Rows, bool kCuts>
class ExpertStripLoop : public ExpertFill<S, Rows, ExpertStripLoop<S, Rows, kCuts>> {
  using Fill = ExpertFill<S, Rows, ExpertStripLoop<S, Rows, kCuts>>;
  using Loop = TileLoop<S, ExpertStripLoop<S, Rows, kCuts>>;
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
    bool keeps = false;   // the sum of a unit of which other warps or blocks have more, ...
    bool parked = false;  // ... and that of one whose other chunks the blocks before have
    bool met = false;
    for (int segment = 0;;) {
      bool stores = false;
      if (segment < found_) {
        next_table(table_);
        const StripSegment<S>& at = here();
        this->clear();
        stage = this->template multiply_chunks<1>(stage, at.chunk, at.chunks);
        this->finish_groups();
        const bool begins = at.chunk == 0 || row_warp_ == 0;  // what the block has of the unit
        stores = at.chunks == w_.chunks;
        keeps = begins && !stores;
        if (!begins) leave_to_warp();
        if (kCuts && keeps && at.chunk + at.chunks == w_.chunks) {
          park();
          parked = true;
          keeps = false;
        }
        ++segment;
      } else if (!met) {
        met = true;
        __syncthreads();
        if (keeps) {
          stores = add_warps();
          if constexpr (kCuts) {
            if (!stores) leave_to_block();
            if (stores && here().chunk > 0) add_blocks();
          }
        }
      } else {
        if (!kCuts || !parked) break;
        parked = false;
        unpark();
        add_blocks();
        stores = true;
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
  // Where several blocks share a unit, each of its warps is to have some chunks.
  static constexpr int kLeastCutChunks = 2 * S::kRowWarps;
  static constexpr int kMostUnitBlocks = 16;
  // Leaving a part and adding it takes as long as some chunks of a warp.
  static constexpr int kHandOver = 4 * S::kRowWarps;

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
    const int blocks = params_.blocks.divisor;
    const int total = units * w_.chunks;
    const int whole = params_.blocks.divide(units);
    const int rest = units - whole * blocks;
    StripRuns runs{total, whole * w_.chunks, rest, w_.chunks};
    if constexpr (kCuts) {
      const int most = runs.begin(1);
      const int least = max(kLeastCutChunks, w_.chunks / kMostUnitBlocks);
      const int even = params_.blocks.divide(total);
      if (params_.may_cut && params_.share != 1 && max(even, least) + kHandOver < most) {
        runs.size = max(even, least);
        runs.larger = even < least ? 0 : total - even * blocks;
        runs.more = 1;
      }
    }
    const int block = blockIdx.x;
    const int first = runs.begin(block);
    const EvenShare run(runs.begin(block + 1) - first, S::kRowWarps);
    const int begin = first + run.begin(row_warp_);
    left_ = run.size(row_warp_);
    next_unit_ = params_.chunks.divide(begin);
    next_chunk_ = begin - next_unit_ * w_.chunks;
    // The loop has no registers for these.
    if (threadIdx.x == 0) tables_.runs = runs;
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
      const int chunks = min(w_.chunks - next_chunk_, left_);
      const int chunk = next_chunk_;
      fill_tile_ = params_.rows.tile(entries_, tile, S::kTokens);
      left_ -= chunks;
      ++next_unit_;
      next_chunk_ = 0;
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
    const int record_pieces = w_.record_bytes / 16;
    const bool lower = this->copies_lower_records();
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
  // The first segment of the block and its sum, while the first warp goes on: nobody else has a use for its part.
  __device__ __forceinline__ void park() {
    leave_to_warp();
    copy_segment(tables_.parked, here());
  }
  __device__ __forceinline__ void unpark() {
    copy_segment(here(), tables_.parked);
    this->clear();
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) Loop::add(sum_[s][0], tables_.parts[row_warp_][s][lane_]);
  }
  __device__ __forceinline__ void copy_segment(StripSegment<S>& to,
                                               const StripSegment<S>& from) const {
    static_assert(sizeof(from) <= 32 * sizeof(int));
    __syncwarp();
    if (lane_ < sizeof(from) / sizeof(int)) {
      reinterpret_cast<int*>(&to)[lane_] = reinterpret_cast<const int*>(&from)[lane_];
    }
    __syncwarp();
  }

  // The parts of the warps after this one; whether the unit ends with them.
  __device__ __forceinline__ bool add_warps() {
    const StripSegment<S>& at = here();
    const int block = blockIdx.x;
    const EvenShare warps(tables_.runs.begin(block + 1) - tables_.runs.begin(block), S::kRowWarps);
    int missing = w_.chunks - at.chunk - at.chunks;
    for (int warp = row_warp_ + 1; missing > 0 && warp < S::kRowWarps; ++warp) {
      missing -= warps.size(warp);
#pragma unroll
      for (int s = 0; s < S::kStrips; ++s) Loop::add(sum_[s][0], tables_.parts[warp][s][lane_]);
    }
    return missing <= 0;
  }

  __device__ __forceinline__ float4* block_part(int block) const {
    return reinterpret_cast<float4*>(scratch_.partials) +
           static_cast<int64_t>(block) * (S::kTileFloats / 4) + lane_;
  }
  __device__ __forceinline__ void leave_to_block() {
    float4* const part = block_part(blockIdx.x);
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) __stcg(part + s * 32, Loop::to_float4(sum_[s][0]));
    __syncwarp();
    if (lane_ == 0) ptx::raise_flag(scratch_.flags + blockIdx.x);
  }
  // Those of the blocks before this one, the nearest first. Blocks start in the order of their numbers, and
  // what they leave waits for none.
  __device__ __forceinline__ void add_blocks() {
    const int last = static_cast<int>(blockIdx.x) - 1;
    const StripRuns& runs = tables_.runs;
    const int unit = params_.chunks.divide(runs.begin(last + 1)) * w_.chunks;
    int parts = 1;
    while (runs.begin(last + 1 - parts) > unit) ++parts;
    for (int i = lane_; i < parts; i += 32) ptx::take_flag(scratch_.flags + last - i);
    __syncwarp();
#pragma unroll 2
    for (int i = 0; i < parts; ++i) {
#pragma unroll
      for (int s = 0; s < S::kStrips; ++s) {
        Loop::add(sum_[s][0], __ldcg(block_part(last - i) + s * 32));
      }
    }
  }

  StripTables<S>& tables_;
  typename Rows::Entries entries_;
  // The walk: see share_out().
  int next_unit_;
  int next_chunk_;
  int left_;
  int found_ = 0;        // segments that have been started to be filled
  int table_ = -1;       // of the segment that is multiplied
  int fill_table_ = -1;  // of the segment that is filled
  TokenTile fill_tile_;
  uint32_t x_row_[2];  // in pieces of 16 bytes
  uint32_t upper_codes_;
};

template <class S, class Rows, bool kCuts>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksTogether)
    expert_strips(const __grid_constant__ ExpertParams<Rows> params) {
  extern __shared__ __align__(128) unsigned char shared[];
  ExpertStripLoop<S, Rows, kCuts>(params, shared).run();
}

}  // namespace marlinq::cuda::sm80
