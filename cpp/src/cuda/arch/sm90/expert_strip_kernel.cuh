// The product over experts of sm90 for tiles of a few rows: bound by the stream of codes, so nothing else may
// wait.
//
// A unit is a packed block of features of a token tile. The blocks share all units in contiguous runs: by halves of
// units, or where that leaves them too uneven by items, each 128 rows of K (4 bits). The warps of a block share its
// run, each a contiguous part, with a ring of its own. Its stages hold an item: codes and the records of their groups,
// which come by bulk copies and so cost a warp little, and rows of x.
//
// A unit that is cut between warps is added up at the end of the block, through shared memory, in the order of the
// warps, by the one whose part comes first. One that is cut between blocks: all but the last leave their sum in
// memory, and the last adds them. Nothing depends on timing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/arch/sm80/expert_output.cuh"
#include "cuda/arch/sm80/expert_tiles.cuh"
#include "cuda/arch/sm80/layout.hpp"
#include "cuda/arch/sm80/share.hpp"
#include "cuda/arch/sm90/rough_divider.cuh"
#include "cuda/arch/sm90/strip_product.cuh"
#include "cuda/problem.hpp"
#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/flag.cuh"
#include "cuda/ptx/launch.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/warp.cuh"

namespace marlinq::cuda::sm90 {

using sm80::Divider;
using sm80::EvenShare;
using sm80::NearTiles;
using sm80::RowPlace;
using sm80::TokenTile;

template <class T_, int kBits_>
struct ExpertStripShape {
  using T = T_;
  static constexpr int kBits = kBits_;
  static constexpr int kTokens = 8;
  static constexpr int kMostWarps = 6;
  // On a multiprocessor: of one kernel, or of it and the next.
  static constexpr int kBlocksTogether = 2;
  static constexpr int kStages = 2;
  static constexpr int kItemChunks = 8 / kBits;  // 4 KB of codes
  static constexpr int kItemSteps = kItemChunks * Layout::kChunkSteps;
  static constexpr int kItemRows = kItemChunks * Layout::kChunkRows;
  static constexpr int kStripBytes = 128 * kBits;  // codes of a strip and chunk
  static constexpr int kChunkBytes = Layout::kBlockStrips * kStripBytes;
  static constexpr int kItemBytes = kItemChunks * kChunkBytes;
  static constexpr int kXPitch = kItemRows * 2 + 16;  // spreads the rows over all banks
  static constexpr int kRecordsPlace = kItemBytes + kTokens * kXPitch;
  // What a warp hands over of a unit: [strip][lane], float4.
  static constexpr int kPartBytes = Layout::kBlockStrips * 32 * 16;
};

/// Blocks that share a unit, about.
constexpr int kMostStripBlocks = 24;

/// What a warp keeps of a segment from when it is asked for until it is stored.
struct StripSegment {
  static constexpr int kTokens = 8;

  int index;  // of the unit in the run of the block
  int expert;
  int feature;  // of y, the first
  int width;    // halves
  int begin;    // items
  int end;
  int y[kTokens];  // row of the output; negative: none
  float weight[kTokens];
};

template <class Rows_>
struct ExpertStripParams {
  using Rows = Rows_;
  static constexpr bool activates = false;
  static constexpr Activation activation = {};

  GemmProblem problem;  // of expert 0
  SplitScratch scratch;
  Rows rows;
  int64_t expert_bytes;
  int num_experts;
  Divider feature_tiles;
  Divider blocks;
  Divider warps;  // of a block
  Divider items;  // of a unit
  int hand_over;  // what it takes to leave a part and to add it, in items of a block
  int stage_bytes;
  int item_groups;      // groups of an item, at most
  int sub_steps;        // steps of an item that have one group
  Divider least_items;  // of a block, where units are cut between blocks
  const float* weights;
  bool weights_bias;
  bool may_cut;
  int share;     // 1: by halves of units, more: by items, 0: as is quicker
  bool settled;  // the rows of the tiles are known before the kernel before has ended
  bool pairs;    // outputs are of type T, and may be stored two at a time
};

/// The division of the units over blocks, and of a block's run over its warps.
class StripRuns {
 public:
  template <class Params>
  __device__ __forceinline__ void divide(const Params& params, int units) {
    const int blocks = params.blocks.divisor;
    const int block = blockIdx.x;
    items_ = params.items;
    warps_ = params.warps;
    const int total = units * items_.divisor;
    const int most_halves = params.blocks.divide(2 * units + blocks - 1);
    // One half alone takes most of the time of two.
    const int by_halves =
        most_halves * items_.divisor / 2 + (most_halves % 2 != 0 ? items_.divisor * 3 / 10 : 0);
    const int by_items = max(params.blocks.divide(total + blocks - 1), params.least_items.divisor);
    const bool cuts = params.may_cut && (params.share == 0 ? by_items + params.hand_over < by_halves
                                                           : params.share > 1);
    first_begin_ = 0;
    last_end_ = items_.divisor;
    if (cuts) {
      const int parts = max(min(blocks, params.least_items.divide(total)), 1);
      by_items_.total = total;
      by_items_.parts = parts;
      // With fewer parts there are few items.
      by_items_.least =
          parts == blocks ? params.blocks.divide(total) : RoughDivider(parts).divide(total);
      by_items_.rest = total - by_items_.least * parts;
      const int begin = by_items_.begin(block);
      const int size = block < by_items_.parts ? by_items_.size(block) : 0;
      first_unit_ = items_.divide(begin);
      first_begin_ = begin - first_unit_ * items_.divisor;
      first_half_ = 0;
      segments_ = size > 0 ? items_.divide(first_begin_ + size + items_.divisor - 1) : 0;
      halves_ = 2 * segments_;
      last_end_ = first_begin_ + size - (segments_ - 1) * items_.divisor;
    } else {
      const int least = params.blocks.divide(2 * units);
      const int rest = 2 * units - least * blocks;  // blocks that have one more
      const int begin = block * least + min(block, rest);
      halves_ = least + (block < rest ? 1 : 0);
      first_unit_ = begin / 2;
      first_half_ = begin % 2;
      segments_ = (first_half_ + halves_ + 1) / 2;
    }
    cost_ = segments_ == 0 ? 0 : cost_before(segments_ - 1) + cost_of(segments_ - 1);
  }

  __device__ __forceinline__ int unit(int segment) const { return first_unit_ + segment; }
  /// Of a unit's two.
  __device__ __forceinline__ int width(int segment) const {
    const int before = segment == 0 ? 0 : 2 * segment - first_half_;
    return min(segment == 0 ? 2 - first_half_ : 2, halves_ - before);
  }
  __device__ __forceinline__ int first_half(int segment) const {
    return segment == 0 ? first_half_ : 0;
  }
  /// The items of a segment.
  __device__ __forceinline__ int begin(int segment) const {
    return segment == 0 ? first_begin_ : 0;
  }
  __device__ __forceinline__ int end(int segment) const {
    return segment + 1 == segments_ ? last_end_ : items_.divisor;
  }

  /// Those of them that belong to `warp` or a later one begin here.
  __device__ __forceinline__ int begin_of_warp(int segment, int warp) const {
    const int rest = begin_of_warp(warp) - cost_before(segment);
    const int first = begin(segment);
    if (rest <= 0) return first;
    const int items = width(segment) == 2 ? (rest + kWholeCost - 1) / kWholeCost
                                          : (rest + kHalfCost - 1) / kHalfCost;
    return min(first + items, end(segment));
  }
  /// The segment that the items of `warp` begin in, or those of a later one: this and begin_of_warp() of it.
  __device__ __forceinline__ int segment_of_warp(int warp) const {
    const int rest = begin_of_warp(warp) - cost_of(0);
    return rest < 0 ? 0 : min(1 + items_.divide(rest / kWholeCost), segments_ - 1);
  }
  __device__ __forceinline__ int segments() const { return segments_; }

  /// The first block with items of the unit of this block's first segment.
  __device__ __forceinline__ int first_block() const {
    const int item = first_unit_ * items_.divisor;
    const int larger = by_items_.rest * (by_items_.least + 1);
    return item < larger ? item / (by_items_.least + 1)
                         : by_items_.rest + (item - larger) / max(by_items_.least, 1);
  }

 private:
  // An item of a half has half of the codes, but all of x.
  static constexpr int kWholeCost = 5;
  static constexpr int kHalfCost = 4;
  __device__ __forceinline__ int item_cost(int segment) const {
    return width(segment) == 2 ? kWholeCost : kHalfCost;
  }
  /// In the cost of all.
  __device__ __forceinline__ int begin_of_warp(int warp) const {
    return warps_.divide(cost_ * warp);
  }
  __device__ __forceinline__ int cost_of(int segment) const {
    return item_cost(segment) * (end(segment) - begin(segment));
  }
  __device__ __forceinline__ int cost_before(int segment) const {
    return segment == 0 ? 0 : cost_of(0) + (segment - 1) * kWholeCost * items_.divisor;
  }

  Divider items_;  // of a unit
  Divider warps_;
  int first_unit_, segments_;
  int first_half_, halves_;     // of the run
  int first_begin_, last_end_;  // items of the first and the last unit
  int cost_;
  EvenShare by_items_;
};

/// Shared memory beside the rings and parts.
template <class S, class Rows>
struct alignas(128) ExpertStripTables {
  // Segments that a warp knows at a time: one that is stored, those in the ring, and the next.
  static constexpr int kCount = S::kStages + 2;

  NearTiles near;
  typename Rows::Entries entries;
  StripSegment segments[S::kMostWarps][kCount];
  StripSegment first;  // of the block, where another left a part of it
  uint64_t barriers[S::kMostWarps][S::kStages];
};

template <class S, class Rows>
class ExpertStrips {
  using Tables = ExpertStripTables<S, Rows>;

 public:
  using T = typename S::T;

  __device__ __forceinline__ ExpertStrips(const ExpertStripParams<Rows>& params,
                                          unsigned char* shared)
      : params_(params),
        p_(params.problem),
        w_(params.problem.weight),
        tables_(*reinterpret_cast<Tables*>(shared)),
        warps_(params.warps.divisor),
        lane_(threadIdx.x % 32) {
    parts_ = reinterpret_cast<float4*>(shared + sizeof(Tables)) + lane_;
    warp_ = ptx::same_in_warp<int>(threadIdx.x / 32);
    ring_ = static_cast<int>(ptx::shared_address(shared)) + static_cast<int>(sizeof(Tables)) +
            warps_ * S::kPartBytes + warp_ * S::kStages * params.stage_bytes;
    barriers_ = static_cast<int>(ptx::shared_address(tables_.barriers[0])) + warp_ * S::kStages * 8;
    group_bytes_ = Layout::kBlockStrips * w_.record_bytes;
    policy_ = ptx::evict_first_policy();
    item_record_bytes_ = params.item_groups * group_bytes_;
    partial_item_ = w_.chunks % S::kItemChunks != 0 || w_.num_groups % params.item_groups != 0
                        ? params.items.divisor - 1
                        : -1;
    x_place_ = S::kItemBytes + lane_ / kRowLanes * S::kXPitch + lane_ % kRowLanes * 16;
    x_row_place_ = S::kItemBytes + lane_ % 8 * S::kXPitch + lane_ / 8 * 16;
    // The loop is to hold these in registers, not to work them out for every item.
    ptx::forget_origin(x_place_);
    ptx::forget_origin(x_row_place_);
    ptx::forget_origin(item_record_bytes_);
    ptx::forget_origin(partial_item_);
  }

  __device__ __forceinline__ void run() {
    init_barriers();
    if (!params_.settled) wait_for_rows();
    const typename Rows::Entries entries = params_.rows.bring_near(tables_.near, blockDim.x);
    runs_.divide(params_, entries.tiles * params_.feature_tiles.divisor);
    if (threadIdx.x == 0) tables_.entries = entries;
    __syncthreads();
    find_run();
    look_up();
    prime();
    int table = -1;
    bool keeps = false;   // a segment that others have parts of
    bool parked = false;  // the first of the block
    bool waited = false;  // for the parts of the other warps
    for (int segment = 0;;) {
      bool stores = false;
      const StripSegment* at = &tables_.first;
      if (segment < found_) {
        next_table(table);
        at = &tables_.segments[warp_][table];
        stores = multiply(*at, ++segment, keeps, parked);
      } else {
        if (!waited) __syncthreads();
        waited = true;
        if (keeps) {
          keeps = false;
          at = &tables_.segments[warp_][table];
          stores = meet(*at);
        } else if (parked) {
          parked = false;
          stores = true;
          take_part(warp_);
          add_blocks();
        } else {
          break;
        }
      }
      if (stores) store(*at);
    }
  }

 private:
  static constexpr uint32_t kNoRow = 0xffffffffu;
  // Of a row of x in an item, and rows that a warp copies at once.
  static constexpr int kRowLanes = S::kItemRows / 8;
  static constexpr int kCopyRows = 32 / kRowLanes;
  static constexpr int kCopies = S::kTokens / kCopyRows;

  __device__ __forceinline__ static void next_table(int& table) {
    table = table + 1 == Tables::kCount ? 0 : table + 1;
  }
  /// No other block has items of it.
  __device__ __forceinline__ bool is_whole(int segment) const {
    return runs_.begin(segment) == 0 && runs_.end(segment) == params_.items.divisor;
  }

  __device__ __forceinline__ void wait_for_rows() {
    if (!waited_) ptx::wait_for_predecessor();
    waited_ = true;
  }

  __device__ __forceinline__ void init_barriers() const {
    if (ptx::elected()) {
      for (int stage = 0; stage < S::kStages; ++stage) ptx::barrier_init(barriers_ + stage * 8, 1);
      ptx::barrier_init_fence();
    }
    __syncwarp();
  }

  // --- filling the ring ---

  // Weights, which where the rows are settled do not depend on the kernel before, and after the wait for it
  // the rows of x.
  __device__ __forceinline__ void prime() {
    find_weights();
    const int early = min(fill_end_ - fill_item_, S::kStages);
    for (int stage = 0; stage < early; ++stage) {
      fill_weights(stage);
      advance_codes();
    }
    fill_item_ -= early;
    if (early > 0) find_rows();
    wait_for_rows();
    for (int stage = 0; stage < S::kStages; ++stage) {
      if (fill_item_ < fill_end_) {
        if (stage >= early) fill_weights(stage);
        fill_x(stage);
        if (stage == 0) find_factors();
        if (stage >= early) {
          advance_codes();
        } else {
          ++fill_item_;
        }
        follow_fill();
      }
      ptx::copy_commit();
    }
    look_up();
    let_next_start();
  }

  __device__ __forceinline__ void let_next_start() const {
    if (warp_ == 0 && fill_item_ == fill_end_) ptx::launch_dependents();
  }

  __device__ __forceinline__ void advance_codes() {
    fill_codes_ += S::kItemBytes;
    ++fill_item_;
  }
  // After an item of x.
  __device__ __forceinline__ void follow_fill() {
    if (fill_item_ < fill_end_) return;
    find_weights();
    if (fill_item_ < fill_end_) {
      find_rows();
      find_factors();
    }
    look_up();
    let_next_start();
  }

  // The segments of this warp: from item next_begin_ of the first to item last_end_ of the last.
  __device__ __forceinline__ void find_run() {
    next_ = 0;
    last_ = -1;
    if (runs_.segments() == 0) return;
    // Odd lanes find the end.
    const int warp = warp_ + lane_ % 2;
    const int segment = runs_.segment_of_warp(warp);
    const int item = runs_.begin_of_warp(segment, warp);
    next_ = ptx::same_in_warp(segment);
    next_begin_ = ptx::same_in_warp(item);
    last_ = ptx::same_in_warp(segment, 1);
    last_end_ = ptx::same_in_warp(item, 1);
    if (next_ < last_ && next_begin_ == runs_.end(next_)) {
      ++next_;
      next_begin_ = runs_.begin(next_);
    }
    // It may end where a segment begins.
    if (last_end_ == runs_.begin(last_)) {
      --last_;
      last_end_ = last_ < next_ ? 0 : runs_.end(last_);
    }
    if (next_ == last_ && next_begin_ >= last_end_) --last_;
  }

  // The tile of the next segment, and its ids: long before they are needed.
  __device__ __forceinline__ void look_up() {
    if (looked_ || next_ > last_) return;
    looked_ = true;
    const int unit = runs_.unit(next_);
    const int tile = params_.feature_tiles.divide(unit);
    next_block_ = unit - tile * params_.feature_tiles.divisor;
    next_tile_ = params_.rows.tile(tables_.entries, tile, S::kTokens);
    next_id_ = lane_ < S::kTokens ? params_.rows.id(tables_.entries, next_tile_, lane_) : -1;
  }

  // The next segment with an expert, if there is one.
  __device__ __forceinline__ void find_weights() {
    fill_item_ = 0;
    fill_end_ = 0;
    while (next_ <= last_) {
      look_up();
      looked_ = false;
      const int segment = next_;
      const int begin = next_begin_;
      const int end = segment == last_ ? last_end_ : runs_.end(segment);
      const int block = next_block_;
      fill_tile_ = next_tile_;
      fill_id_ = next_id_;
      ++next_;
      next_begin_ = 0;
      if (static_cast<uint32_t>(fill_tile_.expert) < static_cast<uint32_t>(params_.num_experts)) {
        fill_item_ = begin;
        fill_end_ = end;
        ++found_;
        next_table(fill_table_);
        set_source(segment, block);
        return;
      }
      if (begin == 0) {
        wait_for_rows();  // or for those who read what was there
        sm80::store_zero_rows(params_, tables_.entries, fill_tile_, S::kTokens, block, 1, lane_,
                              32);
      }
    }
  }

  __device__ __forceinline__ void set_source(int segment, int block) {
    // The first of the unit's strips.
    const int strip = runs_.first_half(segment) * (Layout::kBlockStrips / 2);
    const int64_t expert = fill_tile_.expert * params_.expert_bytes;
    fill_width_ = runs_.width(segment);
    fill_codes_ = reinterpret_cast<const unsigned char*>(w_.codes) + expert +
                  static_cast<int64_t>(block) * w_.chunks * S::kChunkBytes +
                  static_cast<int64_t>(fill_item_) * S::kItemBytes + strip * S::kStripBytes;
    fill_records_ = w_.groups + expert +
                    static_cast<int64_t>(block) * w_.num_groups * group_bytes_ +
                    strip * w_.record_bytes;
    StripSegment& at = tables_.segments[warp_][fill_table_];
    if (lane_ == 0) {
      at.index = segment;
      at.expert = fill_tile_.expert;
      at.feature = block * Layout::kBlockFeatures + strip * Layout::kStripFeatures;
      at.width = fill_width_;
      at.begin = fill_item_;
      at.end = fill_end_;
    }
  }

  // A lane copies a piece of each kCopyRows-th row.
  __device__ __forceinline__ void find_rows() {
    const RowPlace place = params_.rows.place(fill_tile_, lane_, fill_id_);
    const uint32_t first = place.x < 0 ? kNoRow : static_cast<uint32_t>(place.x * p_.x_stride / 8);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      x_row_[i] = __shfl_sync(0xffffffffu, first, i * kCopyRows + lane_ / kRowLanes);
    }
    if (lane_ < S::kTokens) tables_.segments[warp_][fill_table_].y[lane_] = place.y;
    __syncwarp();
  }

  // What the rows of the output are multiplied by, which they wait for, while those of x do not.
  __device__ __forceinline__ void find_factors() {
    float factor = 1.0f;
    if (params_.weights != nullptr) {
      const RowPlace place = params_.rows.place(fill_tile_, lane_, fill_id_);
      if (place.x >= 0) factor = params_.weights[place.weight];
    }
    if (lane_ < S::kTokens) tables_.segments[warp_][fill_table_].weight[lane_] = factor;
    __syncwarp();
  }

  __device__ __forceinline__ int stage_place(int stage) const {
    return ring_ + stage * params_.stage_bytes;
  }

  __device__ __forceinline__ void fill_weights(int stage) const {
    if (!ptx::elected()) return;
    const int codes = stage_place(stage);
    const int records = codes + S::kRecordsPlace;
    const int barrier = barriers_ + stage * 8;
    const int group = (fill_item_ * S::kItemSteps) >> w_.step_shift;
    const unsigned char* source = fill_records_ + static_cast<int64_t>(group) * group_bytes_;
    if (fill_width_ == 2 && fill_item_ != partial_item_) {
      ptx::barrier_expect(barrier, S::kItemBytes + item_record_bytes_);
      ptx::bulk_copy(codes, fill_codes_, S::kItemBytes, barrier, policy_);
      ptx::bulk_copy(records, source, item_record_bytes_, barrier, policy_);
    } else {
      fill_other_weights(codes, records, source, min(params_.item_groups, w_.num_groups - group),
                         barrier);
    }
  }

  // Half a unit, or the end of K.
  __device__ __forceinline__ void fill_other_weights(int codes, int records,
                                                     const unsigned char* source, int groups,
                                                     int barrier) const {
    const int chunks = min(S::kItemChunks, w_.chunks - fill_item_ * S::kItemChunks);
    const int strips = 2 * fill_width_;
    const int code_bytes = strips * S::kStripBytes;
    const int record_bytes = strips * w_.record_bytes;
    ptx::barrier_expect(barrier, chunks * code_bytes + groups * record_bytes);
    copy_parts(codes, fill_codes_, code_bytes, S::kChunkBytes, chunks, barrier);
    copy_parts(records, source, record_bytes, group_bytes_, groups, barrier);
  }

  // `bytes` of each of `count` chunks or groups.
  __device__ __forceinline__ void copy_parts(int target, const unsigned char* source, int bytes,
                                             int stride, int count, int barrier) const {
#pragma unroll 1
    for (int i = 0; i < count; ++i)
      ptx::bulk_copy(target + i * stride, source + i * stride, bytes, barrier, policy_);
  }

  // Packed rows that x has no column for meet zeros.
  __device__ __forceinline__ void fill_x(int stage) const {
    const int target = stage_place(stage) + x_place_;
    const uint32_t piece = fill_item_ * kRowLanes + lane_ % kRowLanes;
    if ((fill_item_ + 1) * S::kItemRows <= p_.x_columns) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i)
        ptx::copy_async_if(x_row_[i] != kNoRow, x_target(target, i), x_source(i, piece));
    } else {
      const bool full = static_cast<int>(piece * 8) < p_.x_columns;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        ptx::copy_async_or_zero_if(x_row_[i] != kNoRow, x_target(target, i), x_source(i, piece),
                                   full);
      }
    }
  }
  __device__ __forceinline__ static int x_target(int first, int i) {
    return first + i * (kCopyRows * S::kXPitch);
  }
  __device__ __forceinline__ const unsigned char* x_source(int i, uint32_t piece) const {
    return static_cast<const unsigned char*>(p_.x) + static_cast<int64_t>(x_row_[i] + piece) * 16;
  }

  // --- the product ---

  // Whether it is to be stored. Otherwise it has been left to others, is to be kept for what they have of it, or
  // is parked. `next`: the number of the next segment.
  __device__ __forceinline__ bool multiply(const StripSegment& at, int next, bool& keeps,
                                           bool& parked) {
    if (at.width == 2) {
      multiply_items<4>(at.begin, at.end);
    } else {
      multiply_items<2>(at.begin, at.end);
    }
    const bool begins = at.begin == runs_.begin(at.index);
    const bool ends = at.end == runs_.end(at.index);
    if (begins && ends && is_whole(at.index)) return true;
    if (begins && next == found_) {
      keeps = true;
      return false;
    }
    leave_to_warp();
    if (begins) {
      // What other blocks have of it is waited for at the end.
      if (lane_ < sizeof(StripSegment) / 4)
        reinterpret_cast<int*>(&tables_.first)[lane_] = reinterpret_cast<const int*>(&at)[lane_];
      parked = true;
    }
    return false;
  }

  // Adds what others have of a segment; false: the sum is left to the next block.
  __device__ __forceinline__ bool meet(const StripSegment& at) {
    add_warps(at);
    if (is_whole(at.index)) return true;
    if (runs_.end(at.index) < params_.items.divisor) {
      leave_to_block();
      return false;
    }
    add_blocks();
    return true;
  }

  template <int kWidth>
  using Product = StripProduct<T, S::kBits, 1, kWidth>;

  template <int kWidth>
  __device__ __forceinline__ void multiply_items(int begin, int end) {
#pragma unroll
    for (int s = 0; s < Layout::kBlockStrips; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum_[s][0][i] = 0.0f;
    }
    typename Product<kWidth>::Values values;
    values.set_middle(w_);
    const typename Product<kWidth>::XFactors factors(w_);
#pragma unroll 1
    for (int item = begin; item < end; ++item) {
      const int stage = stage_place(stage_);
      ptx::copy_wait<S::kStages - 1>();
      __syncwarp();
      ptx::barrier_wait(barriers_ + stage_ * 8, parity_);
      int records = stage + S::kRecordsPlace;
      const int steps = params_.sub_steps;
      if (steps == S::kItemSteps) {
        multiply_group<kWidth, S::kItemSteps, Records::kAny>(stage, records, 0, values, factors);
      } else {
        const int present =
            min(S::kItemSteps, (w_.chunks - item * S::kItemChunks) * Layout::kChunkSteps);
        if (S::kItemSteps > 4 && steps == 4 && present == S::kItemSteps) {
          multiply_groups<kWidth, 4>(stage, records, values, factors);
        } else if (steps == 2 && present == S::kItemSteps) {
          multiply_groups<kWidth, 2>(stage, records, values, factors);
        } else {
#pragma unroll 1
          for (int step = 0; step < present; ++step) {
            multiply_group<kWidth, 1, Records::kAny>(stage, records, step, values, factors);
            if (((step + 1) & (steps - 1)) == 0) records += group_bytes_;
          }
        }
      }
      __syncwarp();
      if (fill_item_ < fill_end_) {
        fill_weights(stage_);
        fill_x(stage_);
        advance_codes();
        follow_fill();
      }
      ptx::copy_commit();
      if (++stage_ == S::kStages) {
        stage_ = 0;
        parity_ ^= 1;
      }
    }
#pragma unroll
    for (int s = 0; s < kWidth; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum_[s][0][i] *= Product<kWidth>::final_factor(i);
    }
  }

  // A whole item whose groups have kSteps steps each: what one group waits for, others hide.
  template <int kWidth, int kSteps>
  __device__ __forceinline__ void multiply_groups(
      int stage, int records, typename Product<kWidth>::Values& values,
      const typename Product<kWidth>::XFactors& factors) {
    if (sm80::records_of(w_) == Records::kHalfScales) {
      multiply_each_group<kWidth, kSteps, Records::kHalfScales>(stage, records, values, factors);
    } else {
      multiply_each_group<kWidth, kSteps, Records::kAny>(stage, records, values, factors);
    }
  }
  template <int kWidth, int kSteps, Records kRecords>
  __device__ __forceinline__ void multiply_each_group(
      int stage, int records, typename Product<kWidth>::Values& values,
      const typename Product<kWidth>::XFactors& factors) {
#pragma unroll
    for (int step = 0; step < S::kItemSteps; step += kSteps) {
      multiply_group<kWidth, kSteps, kRecords>(stage, records, step, values, factors);
      records += group_bytes_;
    }
  }

  template <int kWidth, int kSteps, Records kRecords>
  __device__ __forceinline__ void multiply_group(
      int stage, int records, int first, typename Product<kWidth>::Values& values,
      const typename Product<kWidth>::XFactors& factors) {
    Product<kWidth>::template load<kRecords>(values, records, w_);
    Product<kWidth> product;
    product.template add<kSteps, S::kChunkBytes, kRecords>(
        stage + lane_ * 16, first, values, factors, w_,
        [&](int, int step) { return stage + x_row_place_ + step * 32; });
    product.template finish<0, kSteps, kRecords>(sum_, values, records, w_);
  }

  // --- the end of a segment ---

  __device__ __forceinline__ void store(const StripSegment& at) {
    const int features = at.width * sm80::output_features(params_) / 2;
    sm80::ExpertOutput<T, 1, ExpertStripParams<Rows>>(params_, sum_, at.y, at.weight, 1)
        .store(at.feature, at.feature + features, at.expert);
  }

  __device__ __forceinline__ float4* part(int warp) const {
    return parts_ + warp * (S::kPartBytes / 16);
  }
  __device__ __forceinline__ void leave_to_warp() {
#pragma unroll
    for (int s = 0; s < Layout::kBlockStrips; ++s) {
      part(warp_)[s * 32] = make_float4(sum_[s][0][0], sum_[s][0][1], sum_[s][0][2], sum_[s][0][3]);
    }
  }
  __device__ __forceinline__ void take_part(int warp) {
#pragma unroll
    for (int s = 0; s < Layout::kBlockStrips; ++s) {
      const float4 value = part(warp)[s * 32];
      sum_[s][0][0] = value.x;
      sum_[s][0][1] = value.y;
      sum_[s][0][2] = value.z;
      sum_[s][0][3] = value.w;
    }
  }
  __device__ __forceinline__ void add_part(int strip, float4 value) {
    sum_[strip][0][0] += value.x;
    sum_[strip][0][1] += value.y;
    sum_[strip][0][2] += value.z;
    sum_[strip][0][3] += value.w;
  }

  // The parts of the warps after this one.
  __device__ __forceinline__ void add_warps(const StripSegment& at) {
    int from = at.end;
    const int end = runs_.end(at.index);
#pragma unroll 1
    for (int warp = warp_ + 1; from < end; ++warp) {
      const int to = runs_.begin_of_warp(at.index, warp + 1);
      if (to > from) {
#pragma unroll
        for (int s = 0; s < Layout::kBlockStrips; ++s) add_part(s, part(warp)[s * 32]);
      }
      from = to;
    }
  }

  __device__ __forceinline__ float4* block_part(int block) const {
    return reinterpret_cast<float4*>(params_.scratch.partials) +
           static_cast<int64_t>(block) * (S::kPartBytes / 16) + lane_;
  }
  __device__ __forceinline__ void leave_to_block() {
#pragma unroll
    for (int s = 0; s < Layout::kBlockStrips; ++s) {
      __stcg(block_part(blockIdx.x) + s * 32,
             make_float4(sum_[s][0][0], sum_[s][0][1], sum_[s][0][2], sum_[s][0][3]));
    }
    __syncwarp();
    if (lane_ == 0) ptx::raise_flag(params_.scratch.flags + blockIdx.x);
  }
  // Those of the blocks before this one, the nearest first. Blocks start in the order of their numbers, and these
  // wait for none.
  __device__ __forceinline__ void add_blocks() {
    const int last = static_cast<int>(blockIdx.x) - 1;
    const int parts = last - runs_.first_block() + 1;
    for (int i = lane_; i < parts; i += 32) ptx::take_flag(params_.scratch.flags + last - i);
    __syncwarp();
#pragma unroll 2
    for (int i = 0; i < parts; ++i) {
#pragma unroll
      for (int s = 0; s < Layout::kBlockStrips; ++s)
        add_part(s, __ldcg(block_part(last - i) + s * 32));
    }
  }

  const ExpertStripParams<Rows>& params_;
  const GemmProblem& p_;
  const WeightView& w_;
  Tables& tables_;
  StripRuns runs_;
  float4* parts_;
  int ring_, barriers_;  // as shared addresses are
  int stage_ = 0;
  uint32_t parity_ = 0;
  uint64_t policy_;
  int x_place_, x_row_place_;  // of this lane, in a stage: where it copies to, and what it reads
  int warps_, warp_, lane_;
  int group_bytes_, item_record_bytes_;
  int partial_item_;  // of fewer chunks or groups; -1: none
  bool waited_ = false;
  // The next segment of this warp that is to be filled.
  int next_, next_begin_, next_block_, next_id_;
  bool looked_ = false;  // up: its tile and ids
  int last_, last_end_;  // of the run of this warp
  TokenTile next_tile_;
  // The one that is filled.
  int found_ = 0;
  int fill_table_ = -1;
  int fill_item_, fill_end_, fill_width_, fill_id_;
  TokenTile fill_tile_;
  const unsigned char* fill_codes_;    // of the next item
  const unsigned char* fill_records_;  // of group 0
  // Of this lane: where its pieces for the next item come from.
  uint32_t x_row_[kCopies];  // in pieces of 16 bytes
  float sum_[Layout::kBlockStrips][1][4];
};

template <class S, class Rows>
__global__ void __launch_bounds__(S::kMostWarps * 32, S::kBlocksTogether)
    expert_strips(const __grid_constant__ ExpertStripParams<Rows> params) {
  extern __shared__ __align__(128) unsigned char shared[];
  ExpertStrips<S, Rows>(params, shared).run();
}

}  // namespace marlinq::cuda::sm90
