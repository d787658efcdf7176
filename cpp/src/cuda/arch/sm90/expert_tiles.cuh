// The tiles of the wgmma kernel over experts, how its blocks share them, and what they keep of them in
// shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/arch/sm80/expert_tiles.cuh"
#include "cuda/arch/sm80/layout.hpp"
#include "cuda/arch/sm80/share.hpp"
#include "cuda/arch/sm80/x_tile.cuh"
#include "cuda/arch/sm90/experts.hpp"
#include "cuda/arch/sm90/rough_divider.cuh"
#include "cuda/arch/sm90/tile_plan.hpp"
#include "cuda/arch/sm90/tile_shape.cuh"
#include "cuda/problem.hpp"
#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/launch.cuh"
#include "cuda/ptx/mbarrier.cuh"

namespace marlinq::cuda::sm90 {

using sm80::Divider;
using sm80::Layout;
using sm80::RowPlace;

/// The tile of a block: packed blocks of 64 features x tokens that meet one expert. A warpgroup has two, which
/// meet in an activation, so that both inputs of an output are sums of one thread.
template <class T, int kBits, int kGroups_, int kTokens>
struct ExpertShape : WgmmaShape<T, kBits, kGroups_, 2, kTokens> {
  using Base = WgmmaShape<T, kBits, kGroups_, 2, kTokens>;
  // Tiles multiply as many tokens as they have rows: so many, or more by steps of which the last may be less.
  static constexpr int kLeastTokens = kTokens <= 80 ? 16 : 64;
  static constexpr int kTokenStep = kTokens <= 80 ? 16 : 32;
  __device__ __forceinline__ static int tokens_for(int rows) {
    return max(min((rows + kTokenStep - 1) / kTokenStep * kTokenStep, kTokens), kLeastTokens);
  }
  static constexpr int kGroupOutputBytes = kTokens * Layout::kBlockFeatures * 2;
  static constexpr int kOutputBytes = Base::kGroups * kGroupOutputBytes;
  // Registers move from the warpgroup that fills to the others.
  static constexpr int kLaunchRegisters = 65536 / Base::kThreads / 8 * 8;
  static constexpr int kFillRegisters = kGroups_ == 2 ? 56 : kGroups_ == 3 ? 48 : 64;
  static constexpr int kMultiplyRegisters =
      (kLaunchRegisters * Base::kThreads - kFillRegisters * 128) / Base::kMultiplyThreads / 8 * 8;
};

/// What a tile takes, in microseconds on an H200; a block compares these.
struct ExpertTileCost {
  float slab;
  float cut;     // handing over the parts of a tile, ...
  float part;    // ... for each part, ...
  float block;   // ... and for each block that leaves one
  float uneven;  // runs that cross from a tile into the next
};

template <class Rows_>
struct ExpertTileParams {
  using Rows = Rows_;

  GemmProblem problem;  // of expert 0
  SplitScratch scratch;
  Rows rows;
  int64_t expert_bytes;
  int num_experts;
  Divider feature_tiles;
  Divider blocks;
  ExpertTileCost cost;
  const float* weights;
  bool weights_bias;
  bool activates;
  Activation activation;
  bool may_cut;
  bool joins;          // tiles go over neighbours of the lists that have one expert
  bool settled;        // the rows of the tiles are known before the kernel before has ended
  bool rows_together;  // outputs are of type T, and may be stored 16 bytes at a time
  int share;           // as ExpertPlan's
  int stages;
  int slabs;        // along K
  int slab_groups;  // groups of a slab, 1, 2 or 4
  int group_slabs;  // slabs of a group, a power of two
};

/// A tile of a block, or a part of it.
template <class S>
struct ExpertSegment {
  static constexpr uint32_t kNoRow = 0xffffffffu;

  int tokens;  // that are multiplied, as S::tokens_for(); 0: there are no more segments
  int expert;  // negative: none, the outputs are 0
  int feature_tile;
  int begin;  // slabs
  int end;
  int first_block;                     // where begin is not 0: of those that have the other parts
  alignas(16) uint32_t x[S::kTokens];  // the row's first piece of 16 bytes, or kNoRow
  // The row of the output, or where rows are stored together its first piece of 16 bytes; or kNoRow.
  alignas(16) uint32_t y[S::kTokens];
  float weight[S::kTokens];
};

/// The segments that lie in shared memory: one warp writes them, the others read them one after the
/// other. Each warp has a copy of this.
template <class S>
class SegmentQueue {
 public:
  static constexpr int kCount = 4;
  static constexpr int kBytes = kCount * sizeof(ExpertSegment<S>);
  static constexpr int kBarrierBytes = kCount * 16;

  __device__ __forceinline__ SegmentQueue(unsigned char* segments, uint32_t barriers)
      : segments_(reinterpret_cast<ExpertSegment<S>*>(segments)), barriers_(barriers) {}

  /// By one thread: `readers` warps read.
  __device__ __forceinline__ void init(int readers) const {
    for (int i = 0; i < kCount; ++i) {
      ptx::barrier_init(barriers_ + i * 16, 1);
      ptx::barrier_init(barriers_ + i * 16 + 8, readers);
    }
  }

  __device__ __forceinline__ const ExpertSegment<S>& wait() const {
    ptx::barrier_wait(barriers_ + index_ * 16, parity_);
    return segments_[index_];
  }
  /// The segment is no longer read. By a whole warp.
  __device__ __forceinline__ void release() { finish(barriers_ + index_ * 16 + 8); }

  /// For the warp that writes.
  __device__ __forceinline__ ExpertSegment<S>& wait_for_room() const {
    ptx::barrier_wait(barriers_ + index_ * 16 + 8, parity_ ^ 1);
    return segments_[index_];
  }
  __device__ __forceinline__ void publish() { finish(barriers_ + index_ * 16); }

 private:
  __device__ __forceinline__ void finish(uint32_t barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::barrier_arrive(barrier);
    if (++index_ == kCount) {
      index_ = 0;
      parity_ ^= 1;
    }
  }

  ExpertSegment<S>* segments_;
  uint32_t barriers_;
  int index_ = 0;
  uint32_t parity_ = 0;
};

/// Tiles over neighbours of the lists, in shared memory: the first slot of each, and the end of the last.
struct JoinedTiles {
  alignas(16) uint16_t first[kMostJoinedTiles + 8];  // in units of kJoinedSlots

  __device__ __forceinline__ int begin(int tile) const { return first[tile] * kJoinedSlots; }
};

/// By one warp: finds the segments of its block, and writes them into the queue.
///
/// How many tiles there are is known to the device alone. Each block has so many whole tiles; those that
/// are left are cut into runs of slabs where that is quicker. The last tile of a run comes first, so that
/// whoever waits for a part waits for a block that began with it.
template <class S, class Rows>
class SegmentLister {
 public:
  __device__ __forceinline__ SegmentLister(const ExpertTileParams<Rows>& params,
                                           const SegmentQueue<S>& queue, JoinedTiles& joined)
      : params_(params), queue_(queue), joined_(joined) {}

  __device__ __forceinline__ void run() {
    token_tiles_ = params_.rows.count();
    if constexpr (kJoins) {
      if (params_.joins) token_tiles_ = join(token_tiles_);
    }
    whole_tiles_ = params_.blocks.divide(token_tiles_ * params_.feature_tiles.divisor);
    // All wait for the first tile. If it is a whole one, it does not depend on how those that are left are shared.
    bool shared = false;
#pragma unroll 1
    for (int step = 0;; ++step) {
      if (!shared && step >= min(whole_tiles_, 1)) {
        share_out();
        shared = true;
      }
      if (!has_segment(step)) break;
      write(step);
    }
    ExpertSegment<S>& end = queue_.wait_for_room();
    if (lane() == 0) end.tokens = 0;
    queue_.publish();
  }

 private:
  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }

  // Each lane weighs one way to share the tiles that are left after whole ones: so many blocks a tile; the
  // last lane, all blocks with runs that cross from a tile into the next.
  __device__ __forceinline__ void share_out() {
    const int blocks = gridDim.x;
    const int left = token_tiles_ * params_.feature_tiles.divisor - whole_tiles_ * blocks;
    const int most = min(blocks, left * params_.slabs / 2);
    const bool all = lane() == 31;
    const int tail = all ? most : left * (lane() + 1);
    const bool possible = lane() == 0 || (params_.may_cut && tail > left && tail <= most);
    float cost = INFINITY;
    if (possible && (params_.share == 0 || lane() == params_.share - 1)) {
      const ExpertTileCost& of = params_.cost;
      const float each =
          ptx::divide_roughly(static_cast<float>(tail), static_cast<float>(max(left, 1)));
      cost = ptx::divide_roughly(static_cast<float>(params_.slabs), each) * of.slab;
      if (tail > left) cost += of.cut + each * of.part + static_cast<float>(tail - left) * of.block;
      if (all) cost += of.uneven;
    }
    // Costs are not negative, so that their bits are in their order.
    const uint32_t key = (__float_as_uint(cost) & ~31u) | lane();
    const int chosen = __reduce_min_sync(0xffffffffu, key) & 31;
    const int tail_blocks = left == 0 ? 0 : chosen == 31 ? most : left * (chosen + 1);
    tail_ = sm80::TileCutsBy<RoughDivider>(left, params_.slabs, tail_blocks);
    in_tail_ = static_cast<int>(blockIdx.x) < tail_blocks;
    if (in_tail_) {
      run_begin_ = tail_.begin(blockIdx.x);
      run_end_ = tail_.begin(blockIdx.x + 1);
      last_tail_tile_ = RoughDivider(params_.slabs).divide(run_end_ - 1);
    }
  }

  __device__ __forceinline__ bool has_segment(int step) const {
    return step < whole_tiles_ ||
           (in_tail_ && (last_tail_tile_ - (step - whole_tiles_) + 1) * params_.slabs > run_begin_);
  }

  __device__ __forceinline__ void write(int step) {
    int tile = step * gridDim.x + blockIdx.x;
    int begin = 0, end = params_.slabs, first_block = 0;
    if (step >= whole_tiles_) {
      const int tail_tile = last_tail_tile_ - (step - whole_tiles_);
      const int first = tail_tile * params_.slabs;
      tile = whole_tiles_ * gridDim.x + tail_tile;
      begin = max(run_begin_ - first, 0);
      end = min(run_end_ - first, params_.slabs);
      first_block = begin > 0 ? tail_.block_of(first) : 0;
    }
    int feature_tile;
    const int token_tile = place(tile, feature_tile);
    const sm80::TokenTile rows = tile_of(params_.rows.entries(), token_tile);
    write_rows(rows, feature_tile, begin, end, first_block);
    if (!joins() || end < params_.slabs) return;
    // join() found no row where another tile would have begun. There is none after that place either, if
    // rows come before padding.
    for (int past = S::kTokens; past < rows.rows; past += S::kTokens) {
      write_rows({.expert = rows.expert,
                  .rows = rows.rows - past,
                  .first = rows.first + past,
                  .y = rows.y},
                 feature_tile, 0, end, 0);
    }
  }

  __device__ __forceinline__ void write_rows(const sm80::TokenTile& rows, int feature_tile,
                                             int begin, int end, int first_block) {
    const auto entries = params_.rows.entries();
    const bool here =
        static_cast<uint32_t>(rows.expert) < static_cast<uint32_t>(params_.num_experts);
    if (!here && end < params_.slabs) return;  // whoever has the end of the tile stores zeros
    // What is read is asked for together.
    int ids[kPlaces];
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      const int at = i * 32 + lane();
      ids[i] = at < S::kTokens ? params_.rows.id(entries, rows, at) : -1;
    }
    RowPlace places[kPlaces];
    float weights[kPlaces];
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      places[i] = params_.rows.place(rows, i * 32 + lane(), ids[i]);
      weights[i] =
          params_.weights != nullptr && places[i].x >= 0 ? params_.weights[places[i].weight] : 1.0f;
    }
    int last = 0;
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      const uint32_t present = __ballot_sync(0xffffffffu, places[i].x >= 0);
      if (present != 0) last = i * 32 + 32 - __clz(present);
    }
    if (last == 0) return;
    const int64_t y_step = params_.rows_together ? params_.problem.y_stride / 8 : 1;
    ExpertSegment<S>& segment = queue_.wait_for_room();
    if (lane() == 0) {
      segment.tokens = S::tokens_for(last);
      segment.expert = here ? rows.expert : -1;
      segment.feature_tile = feature_tile;
      segment.begin = here ? begin : 0;
      segment.end = end;
      segment.first_block = first_block;
    }
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      const RowPlace& row = places[i];
      const int at = i * 32 + lane();
      if (at >= S::kTokens) break;
      segment.x[at] = row.x < 0 ? ExpertSegment<S>::kNoRow
                                : static_cast<uint32_t>(row.x * params_.problem.x_stride / 8);
      segment.y[at] = row.x < 0 ? ExpertSegment<S>::kNoRow : static_cast<uint32_t>(row.y * y_step);
      segment.weight[at] = weights[i];
    }
    queue_.publish();
  }

  static constexpr int kPlaces = (S::kTokens + 31) / 32;  // of a lane

  // The token tile and the feature tile of a tile. Token tiles of one expert that stand side by side in an
  // aligned group of 8 are walked through before the next feature tile, so that they share its weights.
  __device__ __forceinline__ int place(int tile, int& feature_tile) const {
    constexpr int kBand = 8;
    const int token_tile = params_.feature_tiles.divide(tile);
    const int first = token_tile / kBand * kBand;
    const int here = token_tile - first;
    const int other = first + lane() % kBand;
    const int expert = expert_of(token_tile);
    const bool same = other < token_tiles_ && expert_of(other) == expert;
    const uint32_t mask = __ballot_sync(0xffffffffu, same) & 0xff;
    const uint32_t below = ~mask & ((1u << here) - 1);
    const int begin = 32 - __clz(below);
    const int width = __ffs(~(mask >> begin)) - 1;
    const int within = tile - (first + begin) * params_.feature_tiles.divisor;
    feature_tile = RoughDivider(width).divide(within);
    return first + begin + within - feature_tile * width;
  }

  // --- tiles over neighbours of the lists ---

  static constexpr bool kJoins = std::is_same_v<Rows, sm80::ListedTiles>;

  __device__ __forceinline__ bool joins() const { return kJoins && params_.joins; }

  // Slots of neighbours that have one expert are cut into tiles from the first of them on; where a tile would
  // begin with padding, there is none. Returns how many there are. No more than one begins in a tile of
  // the lists, which has fewer rows.
  __device__ __forceinline__ int join(int listed) {
    constexpr int kAtOnce = 4;
    const int rows = params_.rows.tile_rows.divisor;
    const auto& lists = params_.rows.lists;
    int count = 0;
    int run = 0;       // tiles of the run that goes on
    int previous = 0;  // its expert
#pragma unroll 1
    for (int first = 0; first < listed; first += 32 * kAtOnce) {
      int expert[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int tile = first + 32 * i + lane();
        expert[i] = tile < listed ? lists.experts[tile] : 0;
      }
      int slot[kAtOnce];  // where a tile begins; negative: none does
      int id[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int tile = first + 32 * i + lane();
        const int before = __shfl_up_sync(0xffffffffu, expert[i], 1);
        const bool differs = tile == 0 || expert[i] != (lane() == 0 ? previous : before);
        const uint32_t starts =
            __ballot_sync(0xffffffffu, differs) & (0xffffffffu >> (31 - lane()));
        const int at = starts != 0 ? lane() - 31 + __clz(starts) : run + lane();
        const unsigned passed = at * rows;
        const int within = (passed + S::kTokens - 1) / S::kTokens * S::kTokens - passed;
        slot[i] = tile < listed && within < rows ? tile * rows + within : -1;
        id[i] = slot[i] >= 0 && at > 0 ? lists.ids[slot[i]] : 0;
        run = __shfl_sync(0xffffffffu, at, 31) + 1;
        previous = __shfl_sync(0xffffffffu, expert[i], 31);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const bool begins =
            slot[i] >= 0 && static_cast<unsigned>(id[i]) < static_cast<unsigned>(lists.num_ids);
        const uint32_t all = __ballot_sync(0xffffffffu, begins);
        if (begins) {
          joined_.first[count + __popc(all & ((1u << lane()) - 1))] =
              static_cast<uint16_t>(slot[i] / kJoinedSlots);
        }
        count += __popc(all);
      }
    }
    if (lane() == 0) joined_.first[count] = static_cast<uint16_t>(listed * rows / kJoinedSlots);
    __syncwarp();
    return count;
  }

  __device__ __forceinline__ int expert_of(int tile) const {
    if constexpr (kJoins) {
      if (params_.joins) {
        return params_.rows.lists.experts[params_.rows.tile_rows.divide(joined_.begin(tile))];
      }
    }
    return params_.rows.expert(tile);
  }
  __device__ __forceinline__ sm80::TokenTile tile_of(const typename Rows::Entries& entries,
                                                     int tile) const {
    if constexpr (kJoins) {
      if (params_.joins) {
        const int first = joined_.begin(tile);
        return {.expert = entries.experts[params_.rows.tile_rows.divide(first)],
                .rows = joined_.begin(tile + 1) - first,
                .first = first,
                .y = 0};
      }
    }
    return params_.rows.tile(entries, tile, S::kTokens);
  }

  const ExpertTileParams<Rows>& params_;
  SegmentQueue<S> queue_;
  JoinedTiles& joined_;
  sm80::TileCutsBy<RoughDivider> tail_;
  int token_tiles_ = 0;
  int whole_tiles_ = 0;
  bool in_tail_ = false;    // this block has a run of the tail's slabs ...
  int run_begin_ = 0;       // ... from here
  int run_end_ = 0;         // to here, ...
  int last_tail_tile_ = 0;  // ... in this tile
};

}  // namespace marlinq::cuda::sm90
