// The dense product of sm90 for few tokens: bound by the stream of codes, so nothing else may wait.
//
// The features are divided over clusters of one or two blocks, in halves of a packed block (32 features);
// a cluster's halves make segments, each inside one block of the packing. The blocks of a cluster share
// K. A block's items (segment, 128 rows of 4-bit codes: 4 KB) are one sequence, of which each warp takes a
// contiguous run and streams it through a ring of its own by bulk copies: no barrier in the loop. At the
// end of a segment or of its run a warp leaves its sums in shared memory. At the end of the block they
// are added in the order of the warps; for every other row of the output the other block of the cluster
// gets them, which adds its own. Nothing depends on timing.
//
// Weights do not depend on the kernel before: the rings are filled before the wait for it. The kernel
// after may start when the last copy has been asked for; earlier its copies would compete with this
// kernel's.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "cuda/arch/sm80/layout.hpp"
#include "cuda/arch/sm80/output.cuh"
#include "cuda/arch/sm80/share.hpp"
#include "cuda/arch/sm80/x_tile.cuh"
#include "cuda/arch/sm90/strip_plan.hpp"
#include "cuda/arch/sm90/strip_product.cuh"
#include "cuda/problem.hpp"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/launch.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/warp.cuh"

namespace marlinq::cuda::sm90 {

using sm80::EvenShare;

/// What groups a strip kernel takes. Those that have no branches for others have fewer instructions to fetch, too.
enum class StripGroups {
  kAny,
  kShort,  // of which an item has several
  kLong,   // of which an item has one
};

template <class T_, int kBits_, int kTokenTiles_, bool kStreamsX_, int kWarps_,
          StripGroups kGroups_ = StripGroups::kAny, Records kRecords_ = Records::kAny>
struct StripShape {
  using T = T_;
  static constexpr int kBits = kBits_;
  static constexpr int kTokenTiles = kTokenTiles_;
  static constexpr int kTokens = kTokenTiles * 8;
  static constexpr bool kStreamsX = kStreamsX_;
  static constexpr int kWarps = kWarps_;
  static constexpr StripGroups kGroups = kGroups_;
  static constexpr Records kRecords = kRecords_;
  static constexpr int kThreads = kWarps * 32;
  // On a multiprocessor: of one kernel, or of it and the next.
  static constexpr int kBlocksTogether = kTokenTiles == 1 ? 2 : 1;
  // Strips that are multiplied at a time: more tokens leave registers for two.
  static constexpr int kStripsTogether = kTokenTiles <= 2 ? 4 : 2;
  static constexpr int kItemChunks = 8 / kBits;  // 4 KB of codes
  static constexpr int kItemSteps = kItemChunks * Layout::kChunkSteps;
  // Both halves of an item, where each is a group, without a loop: the others would lose registers by it.
  static constexpr bool kUnrollsHalves =
      kItemSteps == 8 && (kGroups != StripGroups::kAny || (kStreamsX && kTokenTiles != 2));
  static constexpr int kXTileBytes = kTokens * 128;  // of a chunk, where x is streamed
  static constexpr int kItemRows = kItemChunks * Layout::kChunkRows;
  static constexpr int kStripBytes = 128 * kBits;  // codes of a strip and chunk
  static constexpr int kChunkBytes = Layout::kBlockStrips * kStripBytes;
  static constexpr int kItemBytes = kItemChunks * kChunkBytes;
  // A slot: sums of a warp for a segment, [token][feature]: the 4 floats between tokens put the 32 lanes
  // of a store into 32 banks.
  static constexpr int kSlotRow = Layout::kBlockFeatures + 4;
  static constexpr int kSlotBytes = kTokens * kSlotRow * 4;
};

struct StripParams {
  GemmProblem problem;
  StripMemory memory;
  EvenShare shares;  // of the features, over the clusters: ...
  int share_halves;  // ... so many halves of a packed block each
  int cluster_blocks;
  int stages;
  int early_stages;       // that are filled before the wait for the kernel before
  int items;              // along K
  int part_shift;         // x comes in parts of 1 << part_shift items
  int item_groups;        // groups of an item
  int item_record_bytes;  // of its records
  int partial_item;       // which has fewer chunks or groups; -1: none
  int sub_steps;          // steps of an item that have one group
  bool pairs;             // two outputs fit into one store
  // Where x is streamed: boxes of the rows that there are, and their bytes. What is left of a tile in shared memory are
  // columns of the product that nobody reads.
  TensorMap x_map;
  int x_box_bytes;
};

template <class S>
class StripLoop {
 public:
  using T = typename S::T;

  __device__ __forceinline__ StripLoop(const StripParams& params, unsigned char* shared)
      : params_(params), p_(params.problem), w_(params.problem.weight) {
    warp_ = ptx::same_in_warp<int>(threadIdx.x / 32);
    lane_ = threadIdx.x % 32;
    const int cluster = params.cluster_blocks == 2 ? blockIdx.x / 2 : blockIdx.x;
    rank_ = params.cluster_blocks == 2 ? blockIdx.x % 2 : 0;
    const int first_half = params.shares.begin(cluster) * params.share_halves;
    num_halves_ = params.shares.size(cluster) * params.share_halves;
    first_block_ = first_half / 2;
    skipped_ = first_half % 2;
    segments_ = (num_halves_ + skipped_ + 1) / 2;
    const int larger = params.cluster_blocks == 2 ? (params.items + 1) / 2 : params.items;
    first_item_ = rank_ == 0 ? 0 : larger;
    items_ = rank_ == 0 ? larger : params.items - larger;
    base_ = ptx::shared_address(shared);
    ring_ = base_ + warp_ * params.stages * params.memory.stage_bytes;
    records_ =
        base_ + params.memory.records_place + warp_ * params.stages * params.memory.record_bytes;
    barriers_ = base_ + params.memory.barriers_place;
    ring_barriers_ = barriers_ + warp_ * params.stages * 8;
    part_barriers_ = barriers_ + S::kWarps * params.stages * 8;
    receive_barrier_ = part_barriers_ + S::kWarps * 8;
    contributors_ = base_ + params.memory.contributors_place;
    policy_ = ptx::evict_first_policy();
    if (S::kStreamsX && threadIdx.x == 0) ptx::prefetch_tensor_map(params.x_map);
  }

  __device__ __forceinline__ void run() {
    init_barriers();
    int segment = 0, item = 0, left = 0;
    bool more = first_segment(segment, item, left);
    int x_segment = segment, x_item = item, x_left = left;
    fill_left_ = 0;
    int filled = 0;
    if (more) {
      start_fill(segment, item, left);
      for (; filled < params_.early_stages && fill_left_ > 0; ++filled) {
        fill_weights(filled);
        advance_fill();
      }
    }
    if (warp_ == 0 && fill_left_ == 0) ptx::launch_dependents();
    list_contributors();
    if (!S::kStreamsX) clear_missing_columns();
    __syncthreads();
    if (params_.cluster_blocks == 2) ptx::cluster_wait();
    ptx::wait_for_predecessor();
    if (!S::kStreamsX) copy_x_part();
    if (S::kStreamsX) {
      for (int stage = 0; stage < filled; ++stage) {
        fill_x(stage, x_item);
        ++x_item;
        if (--x_left == 0 && !next_segment(x_segment, x_item, x_left)) x_left = 0;
      }
    }
    if (filled < params_.stages && fill_left_ > 0) {
      for (; filled < params_.stages && fill_left_ > 0; ++filled) {
        fill_weights(filled);
        if (S::kStreamsX) fill_x(filled, fill_item_);
        advance_fill();
      }
      if (warp_ == 0 && fill_left_ == 0) ptx::launch_dependents();
    }
    if (!more) clear_slot(ring_);
    stage_ = 0;
    parity_ = 0;
    parts_there_ = 0;
    while (more) {
      const int finished = segment;
      if (width(segment) == 2) {
        run_segment<4>(segment, item, left);
      } else {
        run_segment<2>(segment, item, left);
      }
      more = next_segment(segment, item, left);
      const uint32_t target = more ? slot(finished) : ring_;
      if (width(finished) == 2) {
        store_sums<4>(target);
      } else {
        store_sums<2>(target);
      }
    }
    __syncthreads();
    finish();
  }

 private:
  // --- the division of the work ---

  /// Halves of a segment, 1 or 2, and those before it.
  __device__ __forceinline__ int width(int segment) const {
    return min(segment == 0 ? 2 - skipped_ : 2, num_halves_ - halves_before(segment));
  }
  __device__ __forceinline__ int halves_before(int segment) const {
    return segment == 0 ? 0 : 2 * segment - skipped_;
  }
  __device__ __forceinline__ int first_strip(int segment) const {  // in its block
    return segment == 0 ? 2 * skipped_ : 0;
  }

  /// What the items of the first segments take: one of two halves 3, one of a single half 2.
  __device__ __forceinline__ int cost_of_segments(int count) const {
    const int halves = count == segments_ ? num_halves_ : halves_before(count);
    return (halves + count) * items_;
  }

  /// The first item of a segment that belongs to `warp` or a later one.
  __device__ __forceinline__ int first_item(int segment, int warp) const {
    const int begin = cost_of_segments(segments_) * warp / S::kWarps;
    const int rest = begin - cost_of_segments(segment);
    if (rest <= 0) return 0;
    return min(width(segment) == 2 ? (rest + 2) / 3 : (rest + 1) / 2, items_);
  }

  /// The first segment with items of this warp.
  __device__ __forceinline__ bool first_segment(int& segment, int& item, int& left) const {
    const int begin = cost_of_segments(segments_) * warp_ / S::kWarps;
    const int rest = begin - cost_of_segments(1);
    segment = rest < 0 ? 0 : min(1 + rest / max(3 * items_, 1), segments_ - 1);
    item = first_item(segment, warp_);
    left = first_item(segment, warp_ + 1) - item;
    return left > 0 || next_segment(segment, item, left);
  }

  /// The next segment with items of this warp, from `segment` + 1 on.
  __device__ __forceinline__ bool next_segment(int& segment, int& item, int& left) const {
    do {
      if (++segment >= segments_) return false;
      item = first_item(segment, warp_);
      left = first_item(segment, warp_ + 1) - item;
    } while (left <= 0);
    return true;
  }

  // Which warps have items of each segment: the first, the last, and whether that goes on with the next.
  // Before a block barrier.
  __device__ __forceinline__ void list_contributors() {
    for (int segment = warp_; segment < segments_; segment += S::kWarps) {
      const uint32_t here =
          __ballot_sync(0xffffffffu, lane_ < S::kWarps && has_items(segment, lane_));
      const int last = 31 - __clz(here | 1);
      const bool goes_on = segment + 1 < segments_ && has_items(segment + 1, last);
      if (lane_ == 0) {
        ptx::store_shared_4(
            contributors_ + segment * 4,
            here == 0 ? 1 : (__ffs(here) - 1) | last << 8 | (goes_on ? 1 << 16 : 0));
      }
    }
  }
  __device__ __forceinline__ bool has_items(int segment, int warp) const {
    return first_item(segment, warp) < first_item(segment, warp + 1);
  }

  // Which block of a cluster of two writes a row of a segment.
  __device__ __forceinline__ static int owner(int token, int segment) {
    return (token ^ segment) & 1;
  }

  /// Rows of segments that this block writes.
  __device__ __forceinline__ int own_rows() const {
    const int even = (segments_ + 1) / 2;
    return even * ((p_.m + 1 - rank_) / 2) + (segments_ - even) * ((p_.m + rank_) / 2);
  }

  __device__ __forceinline__ void init_barriers() const {
    if (ptx::elected()) {
      for (int stage = 0; stage < params_.stages; ++stage)
        ptx::barrier_init(ring_barriers_ + stage * 8, 1);
      ptx::barrier_init(part_barriers_ + warp_ * 8, 1);
      if (warp_ == 0) ptx::barrier_init(receive_barrier_, 1);
      ptx::barrier_init_fence();
      if (warp_ == 0) ptx::barrier_expect(receive_barrier_, own_rows() * kRowBytes);
    }
    __syncwarp();
    if (params_.cluster_blocks == 2) ptx::cluster_arrive();
  }

  // --- filling the ring ---

  __device__ __forceinline__ void start_fill(int segment, int item, int left) {
    fill_segment_ = segment;
    fill_width_ = width(segment);
    fill_item_ = item;
    fill_left_ = left;
    const int64_t block = first_block_ + segment;
    fill_codes_ = reinterpret_cast<const unsigned char*>(w_.codes) +
                  (block * w_.chunks + (first_item_ + item) * S::kItemChunks) * S::kChunkBytes +
                  first_strip(segment) * S::kStripBytes;
    fill_records_ = w_.groups + block * w_.num_groups * group_bytes();
  }

  __device__ __forceinline__ void advance_fill() {
    ++fill_item_;
    fill_codes_ += S::kItemChunks * S::kChunkBytes;
    if (--fill_left_ > 0) return;
    int segment = fill_segment_, item = 0, left = 0;
    if (next_segment(segment, item, left)) start_fill(segment, item, left);
  }

  __device__ __forceinline__ int record_bytes() const {
    return sm80::record_bytes<S::kRecords>(w_);
  }
  __device__ __forceinline__ int group_bytes() const {
    return Layout::kBlockStrips * record_bytes();
  }
  __device__ __forceinline__ uint32_t stage_place(int stage) const {
    return ring_ + stage * params_.memory.stage_bytes;
  }

  __device__ __forceinline__ void fill_weights(int stage) const {
    if (!ptx::elected()) return;
    const uint32_t target = stage_place(stage);
    const uint32_t barrier = ring_barriers_ + stage * 8;
    const int item = first_item_ + fill_item_;
    const int group = (item * S::kItemSteps) >> w_.step_shift;
    const uint32_t x_bytes = S::kStreamsX ? S::kItemChunks * params_.x_box_bytes : 0;
    const bool whole = fill_width_ == 2;
    if (whole && item != params_.partial_item) {
      ptx::barrier_expect(barrier, S::kItemBytes + params_.item_record_bytes + x_bytes);
      ptx::bulk_copy(target, fill_codes_, S::kItemBytes, barrier, policy_);
      ptx::bulk_copy(records_ + stage * params_.memory.record_bytes,
                     fill_records_ + static_cast<int64_t>(group) * group_bytes(),
                     params_.item_record_bytes, barrier);
      return;
    }
    const int chunks = min(S::kItemChunks, w_.chunks - item * S::kItemChunks);
    const int records = min(params_.item_groups, w_.num_groups - group) * group_bytes();
    ptx::barrier_expect(barrier,
                        chunks * (whole ? S::kChunkBytes : S::kChunkBytes / 2) + records + x_bytes);
    if (whole) {
      ptx::bulk_copy(target, fill_codes_, chunks * S::kChunkBytes, barrier, policy_);
    } else {
#pragma unroll
      for (int chunk = 0; chunk < S::kItemChunks; ++chunk) {
        if (chunk < chunks) {
          ptx::bulk_copy(target + chunk * S::kChunkBytes, fill_codes_ + chunk * S::kChunkBytes,
                         S::kChunkBytes / 2, barrier, policy_);
        }
      }
    }
    ptx::bulk_copy(records_ + stage * params_.memory.record_bytes,
                   fill_records_ + static_cast<int64_t>(group) * group_bytes(), records, barrier);
  }

  /// Bytes of a row of x that are there, of `count` items.
  __device__ __forceinline__ int x_row_bytes(int item, int count) const {
    const int first = (first_item_ + item) * S::kItemRows;
    return max(min(count * S::kItemRows, p_.x_columns - first), 0) * 2;
  }
  __device__ __forceinline__ const unsigned char* x_source(int token, int item) const {
    return static_cast<const unsigned char*>(p_.x) +
           (token * p_.x_stride + static_cast<int64_t>(first_item_ + item) * S::kItemRows) * 2;
  }

  // Chunks that the weight does not have meet zeros: whatever codes lie there.
  __device__ __forceinline__ void fill_x(int stage, int item) const {
    if (!ptx::elected()) return;
    const uint32_t target = stage_place(stage) + S::kItemBytes;
    const int column = (first_item_ + item) * S::kItemRows;
#pragma unroll
    for (int chunk = 0; chunk < S::kItemChunks; ++chunk) {
      ptx::tensor_copy(target + chunk * S::kXTileBytes, params_.x_map,
                       column + chunk * Layout::kChunkRows, 0, ring_barriers_ + stage * 8);
    }
  }

  // Each warp asks for one part of x, for all warps.
  __device__ __forceinline__ void copy_x_part() const {
    const int item = warp_ << params_.part_shift;
    const int count = min(1 << params_.part_shift, items_ - item);
    if (count <= 0) return;
    const int bytes = x_row_bytes(item, count);
    const uint32_t barrier = part_barriers_ + warp_ * 8;
    if (ptx::elected()) ptx::barrier_expect(barrier, p_.m * bytes);
    if (lane_ < p_.m && bytes > 0) {
      ptx::bulk_copy(base_ + params_.memory.x_place + lane_ * params_.memory.x_pitch +
                         item * (S::kItemRows * 2),
                     x_source(lane_, item), bytes, barrier);
    }
  }

  // Zeros where x ends inside the last item. Before a block barrier.
  __device__ __forceinline__ void clear_missing_columns() const {
    const int end = items_ * S::kItemRows * 2;
    for (int token = warp_; token < p_.m; token += S::kWarps) {
      for (int at = x_row_bytes(0, items_) + lane_ * 16; at < end; at += 32 * 16) {
        ptx::store_shared_16(base_ + params_.memory.x_place + token * params_.memory.x_pitch + at,
                             make_uint4(0, 0, 0, 0));
      }
    }
  }

  // --- the product ---

  template <int kWidth>
  __device__ __forceinline__ void run_segment(int segment, int item, int left) {
#pragma unroll
    for (int s = 0; s < kWidth; ++s) {
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum_[s][t][i] = 0.0f;
      }
    }
    ProductValues<kWidth> values[kWidth / kTogether<kWidth>];
#pragma unroll
    for (ProductValues<kWidth>& of : values) of.set_middle(w_);
    const typename Product<kWidth>::XFactors factors(w_);
    const uint32_t records = records_ + first_strip(segment) * record_bytes();
    uint32_t x_rows[S::kTokenTiles];
#pragma unroll
    for (int t = 0; t < S::kTokenTiles; ++t) {
      // Tokens that are not there are columns of the product that nobody reads.
      const int token = t * 8 + lane_ % 8 < p_.m ? t * 8 + lane_ % 8 : 0;
      x_rows[t] = S::kStreamsX ? S::kItemBytes + sm80::x_piece_place(lane_ % 8 + t * 8, lane_ / 8)
                               : base_ + params_.memory.x_place + token * params_.memory.x_pitch +
                                     lane_ / 8 * 16;
    }
#pragma unroll 1
    do {
      const uint32_t stage = stage_place(stage_);
      ptx::barrier_wait(ring_barriers_ + stage_ * 8, parity_);
      if (!S::kStreamsX) wait_for_part(item);
      const uint32_t x_move = S::kStreamsX ? stage : item * (S::kItemRows * 2);
      const int steps = params_.sub_steps;
      if (S::kGroups == StripGroups::kLong ||
          (S::kGroups == StripGroups::kAny && steps >= S::kItemSteps)) {
        multiply<kWidth, S::kItemSteps>(stage, 0, x_rows, x_move,
                                        records + stage_ * params_.memory.record_bytes, values,
                                        factors);
      } else {
        const int present =
            min(S::kItemSteps, (w_.chunks - (first_item_ + item) * S::kItemChunks) * 4);
        uint32_t group_records = records + stage_ * params_.memory.record_bytes;
        if (S::kUnrollsHalves && steps == 4 && present == S::kItemSteps) {
          multiply_groups<kWidth, 4>(stage, x_rows, x_move, group_records, values, factors);
        } else if (steps == 2 && present == S::kItemSteps) {
          multiply_groups<kWidth, 2>(stage, x_rows, x_move, group_records, values, factors);
        } else {
          const int at_once = !S::kUnrollsHalves && steps == 4 ? 4 : 1;
#pragma unroll 1
          for (int step = 0; step < present; step += at_once) {
            if (at_once == 4) {
              multiply<kWidth, 4>(stage, step, x_rows, x_move, group_records, values, factors);
            } else {
              multiply<kWidth, 1>(stage, step, x_rows, x_move, group_records, values, factors);
            }
            if (((step + at_once) & (steps - 1)) == 0) group_records += group_bytes();
          }
        }
      }
      __syncwarp();
      if (fill_left_ > 0) {
        fill_weights(stage_);
        if (S::kStreamsX) fill_x(stage_, fill_item_);
        advance_fill();
        if (fill_left_ == 0 && warp_ == 0) ptx::launch_dependents();
      }
      if (++stage_ == params_.stages) {
        stage_ = 0;
        parity_ ^= 1;
      }
      ++item;
    } while (--left > 0);
  }

  __device__ __forceinline__ void wait_for_part(int item) {
    const int part = item >> params_.part_shift;
    if ((parts_there_ >> part & 1) != 0) return;
    ptx::barrier_wait(part_barriers_ + part * 8, 0);
    parts_there_ |= 1 << part;
  }

  template <int kWidth>
  static constexpr int kTogether = std::min(kWidth, S::kStripsTogether);
  template <int kWidth>
  using Product = StripProduct<T, S::kBits, S::kTokenTiles, kTogether<kWidth>>;
  template <int kWidth>
  using ProductValues = typename Product<kWidth>::Values;

  // A whole item whose groups have kSteps steps each: what one group waits for, others hide.
  template <int kWidth, int kSteps, class Values>
  __device__ __forceinline__ void multiply_groups(
      uint32_t stage, const uint32_t (&x_rows)[S::kTokenTiles], uint32_t x_move, uint32_t records,
      Values& values, const typename Product<kWidth>::XFactors& factors) {
#pragma unroll
    for (int step = 0; step < S::kItemSteps; step += kSteps) {
      multiply<kWidth, kSteps>(stage, step, x_rows, x_move, records, values, factors);
      records += group_bytes();
    }
  }

  // kSteps steps of one group, from step `first` of the item on.
  template <int kWidth, int kSteps, class Values>
  __device__ __forceinline__ void multiply(uint32_t stage, int first,
                                           const uint32_t (&x_rows)[S::kTokenTiles],
                                           uint32_t x_move, uint32_t records, Values& values,
                                           const typename Product<kWidth>::XFactors& factors) {
    const uint32_t second_records = records + kTogether<kWidth> * record_bytes();
    Product<kWidth>::template load<S::kRecords>(values[0], records, w_);
    if constexpr (kTogether<kWidth> < kWidth) {
      Product<kWidth>::template load<S::kRecords>(values[1], second_records, w_);
    }
    const uint32_t codes = stage + lane_ * 16;
    const auto x_of = [&](int t, int step) { return x_address(x_rows[t], x_move, step); };
    Product<kWidth> product;
    product.template add<kSteps, S::kChunkBytes, S::kRecords>(codes, first, values[0], factors, w_,
                                                              x_of);
    product.template finish<0, kSteps, S::kRecords>(sum_, values[0], records, w_);
    if constexpr (kTogether<kWidth> < kWidth) {
      static_assert(kWidth == 2 * kTogether<kWidth>);
      Product<kWidth> second;
      second.template add<kSteps, S::kChunkBytes, S::kRecords>(
          codes + kTogether<kWidth> * S::kStripBytes, first, values[1], factors, w_, x_of);
      second.template finish<kTogether<kWidth>, kSteps, S::kRecords>(sum_, values[1],
                                                                     second_records, w_);
    }
  }

  // Of two steps, where the second is there.
  __device__ __forceinline__ static uint32_t x_address(uint32_t row, uint32_t move, int step) {
    if constexpr (!S::kStreamsX) return row + move + step * 32;
    const uint32_t tile = row + move + step / Layout::kChunkSteps * S::kXTileBytes;
    return tile ^ (step % Layout::kChunkSteps * 32);
  }

  // --- the end ---

  static constexpr int kRowBytes = Layout::kBlockFeatures * 4;
  static constexpr int kUnitRows = 4;  // of 8, those of one block

  // Only one warp can go on from a segment to the next, and leaves its sums in the slot of the first; the
  // last sums of a warp go to the begin of its own ring.
  __device__ __forceinline__ uint32_t slot(int segment) const {
    return base_ + params_.memory.slots_place + segment * S::kSlotBytes;
  }

  // Of a warp without items, which may stand between others that have some.
  __device__ __forceinline__ void clear_slot(uint32_t target) const {
    for (int at = lane_ * 16; at < S::kSlotBytes; at += 32 * 16)
      ptx::store_shared_16(target + at, make_uint4(0, 0, 0, 0));
  }

  template <int kWidth>
  __device__ __forceinline__ void store_sums(uint32_t target) {
    const uint32_t place = target + (lane_ % 4 * (2 * S::kSlotRow) + lane_ / 4) * 4;
#pragma unroll
    for (int s = 0; s < kWidth; ++s) {
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum_[s][t][i] *= Product<kWidth>::final_factor(i);
          ptx::store_shared_4(place + ((t * 8 + i % 2) * S::kSlotRow + s * 16 + i / 2 * 8) * 4,
                              __float_as_uint(sum_[s][t][i]));
        }
      }
    }
  }

  // Rows `first`, `first` + 2, ... of a segment, for two features of a lane: the sums of this block.
  __device__ __forceinline__ void add_warps(int first, int segment,
                                            float2 (&sum)[kUnitRows]) const {
    const uint32_t who = ptx::load_shared_4(contributors_ + segment * 4);
    const int last = who >> 8 & 0xff;
    const uint32_t ring_bytes = params_.stages * params_.memory.stage_bytes;
    const uint32_t place = (first * S::kSlotRow + lane_ * 2) * 4;
#pragma unroll
    for (int i = 0; i < kUnitRows; ++i) sum[i] = make_float2(0.0f, 0.0f);
#pragma unroll 2
    for (int warp = who & 0xff; warp <= last; ++warp) {
      const bool goes_on = warp == last && (who >> 16) != 0;
      const uint32_t from = (goes_on ? slot(segment) : base_ + warp * ring_bytes) + place;
#pragma unroll
      for (int i = 0; i < kUnitRows; ++i) {
        const float2 part = ptx::load_shared_float2(from + i * (2 * S::kSlotRow * 4));
        sum[i].x += part.x;
        sum[i].y += part.y;
      }
    }
  }

  // Every other row of a segment belongs to the one block, the rest to the other. Of 8 rows, a warp takes
  // those of a block at once.
  __device__ __forceinline__ void finish() const {
    const bool two = params_.cluster_blocks == 2;
    const int received = (min(p_.m, 8) + 1) / 2;  // rows, at most, of a unit
    const uint32_t receive = base_ + params_.memory.receive_place + lane_ * 8;
    float2 sum[kUnitRows];
    if (two) {
      const uint32_t other = static_cast<uint32_t>(rank_ ^ 1);
      const uint32_t target = ptx::address_in_block(receive, other);
      const uint32_t barrier = ptx::address_in_block(receive_barrier_, other);
      for (int unit = warp_; unit < segments_ * S::kTokenTiles; unit += S::kWarps) {
        const int segment = unit / S::kTokenTiles;
        const int first = unit % S::kTokenTiles * 8 + owner(rank_ ^ 1, segment);
        add_warps(first, segment, sum);
#pragma unroll
        for (int i = 0; i < kUnitRows; ++i) {
          if (first + 2 * i < p_.m)
            ptx::store_async(target + (unit * received + i) * kRowBytes, sum[i], barrier);
        }
      }
    }
    for (int unit = warp_; unit < segments_ * S::kTokenTiles; unit += S::kWarps) {
      const int segment = unit / S::kTokenTiles;
      const int feature = ((first_block_ + segment) * Layout::kBlockStrips + first_strip(segment)) *
                              Layout::kStripFeatures +
                          lane_ * 2;
#pragma unroll 1
      for (int rank = two ? rank_ : 0; rank <= (two ? rank_ : 1); ++rank) {
        const int first = unit % S::kTokenTiles * 8 + owner(rank, segment);
        add_warps(first, segment, sum);
        if (two) ptx::barrier_wait(receive_barrier_, 0);
#pragma unroll
        for (int i = 0; i < kUnitRows; ++i) {
          if (first + 2 * i >= p_.m) continue;
          if (two) {
            // The same sum whichever block adds.
            const float2 part =
                ptx::load_shared_float2(receive + (unit * received + i) * kRowBytes);
            sum[i].x += part.x;
            sum[i].y += part.y;
          }
          if (lane_ < width(segment) * 16) store_pair(first + 2 * i, feature, sum[i]);
        }
      }
    }
  }

  __device__ __forceinline__ void store_pair(int token, int feature, float2 value) const {
    if (!params_.pairs) {
      sm80::store_output_pair(p_, token, feature, value);
      return;
    }
    if (feature >= w_.n) return;
    if (w_.bias != nullptr) {
      value.x += w_.bias[feature];
      value.y += w_.bias[feature + 1];
    }
    T* const y = static_cast<T*>(p_.y) + token * p_.y_stride + feature;
    *reinterpret_cast<uint32_t*>(y) = sm80::round_pair<T>(value.x, value.y);
  }

  const StripParams& params_;
  const GemmProblem& p_;
  const WeightView& w_;
  uint32_t base_, ring_, records_, barriers_, ring_barriers_, part_barriers_, receive_barrier_,
      contributors_;
  int warp_, lane_, rank_;
  int first_block_;  // of the packing
  int skipped_;      // halves of it that are not ours
  int num_halves_, segments_;
  int first_item_, items_;  // of this block's share of K
  int stage_, parts_there_;
  uint32_t parity_;
  uint64_t policy_;
  // Where the next copies of this warp come from.
  int fill_segment_, fill_item_, fill_left_, fill_width_;
  const unsigned char* fill_codes_;
  const unsigned char* fill_records_;  // of packed group 0
  float sum_[Layout::kBlockStrips][S::kTokenTiles][4];
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksTogether)
    strip_gemm(const __grid_constant__ StripParams params) {
  extern __shared__ __align__(1024) unsigned char shared[];
  StripLoop<S> loop(params, shared);
  loop.run();
}

}  // namespace marlinq::cuda::sm90
