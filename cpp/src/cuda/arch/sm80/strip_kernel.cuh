// The dense product of the sm_80 family for few tokens: bound by the stream of codes, so nothing
// else may wait.
//
// A block owns whole strips, in strip groups of up to 4. Its items (strip group, chunk of 64 packed
// rows) are one sequence; each warp takes a contiguous run of it, of equal cost, and streams codes,
// group records and its rows of x through a ring of its own: no barrier in the loop. At the end of a
// strip group or of its run a warp leaves its sums in shared memory; at the end of the block they
// are added in the order of the warps, so nothing depends on timing.
//
// Weights do not depend on the kernel before: they are asked for before the wait for it.
//
// Bytes in flight: 4.65 TB/s over 132 multiprocessors and about 1 us of latency is 35 KB each;
// 8 warps with 3 stages ahead of 2 KB have 48. Instructions: at 4.65 TB/s and 1.8 GHz an item of 4
// strips has 115 clocks of its multiprocessor, 460 issue slots, of which decoding and products take
// 180; what is left of the loop must stay small, so addresses are pointers that advance. What runs
// once stays rolled: a kernel of a few microseconds fetches all its instructions anew.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/arch/sm80/code_scales.cuh"
#include "cuda/arch/sm80/group_values.cuh"
#include "cuda/arch/sm80/layout.hpp"
#include "cuda/arch/sm80/output.cuh"
#include "cuda/arch/sm80/plan.hpp"
#include "cuda/arch/sm80/share.hpp"
#include "cuda/arch/sm80/x_tile.cuh"
#include "cuda/device/dequantize.cuh"
#include "cuda/problem.hpp"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/launch.cuh"
#include "cuda/ptx/mma.cuh"

namespace marlinq::cuda::sm80 {

// kPromotes: sums of a group are kept apart and added, scaled, to the sums of all; else there is one
// set, in units of the current group's scale (tile_loop.cuh says how), which takes fewer registers.
template <class T_, int kBits_, int kTokenTiles_, int kMaxWarps_, bool kPromotes_, GroupForm kForm_>
struct StripShape {
  using T = T_;
  static constexpr int kBits = kBits_;
  static constexpr int kTokenTiles = kTokenTiles_;
  static constexpr int kTokens = kTokenTiles * 8;
  static constexpr int kMaxWarps = kMaxWarps_;
  static constexpr bool kPromotes = kPromotes_;
  static constexpr GroupForm kForm = kForm_;
  static constexpr bool kShortGroups = kForm == GroupForm::kShort;
  static constexpr bool kLongGroups = has_long_groups(kForm);
  static constexpr Records kRecords = records_of(kForm);
  // Codes of short groups are multiplied by their scales: for weights of has_short_groups() alone.
  // Sums that are kept apart take fewer instructions, codes of bfloat16 as many.
  static constexpr bool kScalesCodes = kShortGroups && !kPromotes && std::is_same_v<T, __half>;
  // Two ahead of the one that is multiplied: with 8 warps and more the bytes in flight suffice, and
  // more stages were no faster.
  static constexpr int kStages = 3;
  static constexpr int kStrips = Layout::kBlockStrips;
  static constexpr int kPieces = kBits / 4;
  static constexpr int kStripBytes = kPieces * 512;  // codes of a strip and chunk
  static constexpr int kBlockBytes = kStrips * kStripBytes;
  static constexpr int kXBytes = kTokens * kXRowBytes;
  // A slot: sums of a warp for a strip group, [token][feature]: the 4 floats between tokens put the 32 lanes
  // of a store into 32 banks.
  static constexpr int kSlotRow = kStrips * 16 + 4;
  static constexpr int kSlotFloats = kTokens * kSlotRow;
};

/// How the strips of a block make strip groups, and their items are divided among its warps.
struct StripShare {
  EvenShare strips;  // over the strip groups
  EvenShare costs;   // over the warps
  int chunks = 0;

  /// What an item costs, in units of a strip's decoding and products: about 40 instructions, and 120
  /// that do not depend on the width.
  static constexpr int kItemCost = 3;

  StripShare() = default;
  StripShare(int block_strips, int num_chunks, int warps)
      : strips(block_strips, (block_strips + Layout::kBlockStrips - 1) / Layout::kBlockStrips),
        costs((block_strips + strips.parts * kItemCost) * num_chunks, warps),
        chunks(num_chunks) {}

  /// First chunk of a strip group that belongs to `warp` or a later one.
  __device__ __forceinline__ int first_chunk(int group, int warp) const {
    const int before = (strips.begin(group) + group * kItemCost) * chunks;
    const int rest = costs.begin(warp) - before;
    return rest <= 0 ? 0 : min(divide_up(rest, strips.size(group) + kItemCost), chunks);
  }

 private:
  // By 4 to 7, without a division: exact for values below 2^23.
  __device__ __forceinline__ static int divide_up(int value, int by) {
    const int quotient =
        static_cast<int>(ptx::divide_roughly(static_cast<float>(value), static_cast<float>(by))) -
        1;
    const int rest = value - quotient * by;
    return quotient + (rest > 2 * by ? 3 : (rest > by ? 2 : (rest > 0 ? 1 : 0)));
  }
};

struct StripParams {
  GemmProblem problem;
  EvenShare strips;    // over the blocks
  StripShare smaller;  // of a block with strips.least strips
  StripShare larger;   // with one more
  StripMemory memory;
};

template <class S>
class StripLoop {
  // Where x and the codes after it lie, and where the group records do.
  struct Stage {
    uint32_t data, records;
  };

 public:
  using T = typename S::T;

  __device__ __forceinline__ StripLoop(const StripParams& params, unsigned char* shared,
                                       float* slots)
      : params_(params),
        p_(params.problem),
        w_(params.problem.weight),
        share_(blockIdx.x < params.strips.rest ? params.larger : params.smaller),
        slots_(slots) {
    warp_ = threadIdx.x / 32;
    lane_ = threadIdx.x % 32;
    first_strip_ = params.strips.begin(blockIdx.x);
    // A strip's record is 2 to 5 pieces of 16 bytes.
    record_ = static_cast<int>(ptx::divide_roughly(static_cast<float>(lane_) + 0.5f,
                                                   static_cast<float>(w_.record_bytes / 16)));
    shared_ = shared;
    missing_chunk_ =
        p_.x_columns % Layout::kChunkRows == 0 ? -1 : p_.x_columns / Layout::kChunkRows;
    const StripMemory& memory = params.memory;
    const int warps = blockDim.x / 32;
    ring_ = {ptx::shared_address(shared) + warp_ * S::kStages * memory.stage_bytes,
             ptx::shared_address(shared) + warps * S::kStages * memory.stage_bytes +
                 warp_ * S::kStages * memory.record_bytes};
    ring_end_ = ring_.data + S::kStages * memory.stage_bytes;
  }

  __device__ __forceinline__ void run(uint32_t* contributors) {
    int group = -1, chunk = 0, left = 0;
    bool more = next_group(group, chunk, left);
    if (more) {
      prime(group, chunk, left);
    } else {
      ptx::wait_for_predecessor();
    }
    list_contributors(contributors);
    clear_sums();
    values_.set_middle(w_);
    stage_ = ring_;
    while (more) {
      const int width = share_.strips.size(group);
      switch (width) {
        case 1:
          run_group<1>(chunk, left);
          break;
        case 2:
          run_group<2>(chunk, left);
          break;
        case 3:
          run_group<3>(chunk, left);
          break;
        default:
          run_group<4>(chunk, left);
      }
      if constexpr (S::kScalesCodes) set_scaled_units(values_);
      finish_group();
      const int finished = group;
      more = next_group(group, chunk, left);
      if (!more) ptx::copy_wait<0>();
      store_sums(more ? slots_ + finished * S::kSlotFloats : own_slot(warp_), width);
    }
  }

  /// Adds what the warps left, in their order, and writes the output. After a block barrier. A warp
  /// takes a token of a strip group at a time, a lane two features.
  __device__ __forceinline__ void store_tile(const uint32_t* contributors) const {
    const int groups = share_.strips.parts;
    const int place = lane_ * 2;
#pragma unroll 1
    for (int unit = warp_; unit < groups * p_.m; unit += share_.costs.parts) {
      const int token = unit / groups;
      const int group = unit % groups;
      if (place >= share_.strips.size(group) * 16) continue;
      float2 sum = make_float2(0.0f, 0.0f);
      const uint32_t later = group + 1 < groups ? contributors[group + 1] : 0;
#pragma unroll 1
      for (uint32_t warps = contributors[group]; warps != 0; warps &= warps - 1) {
        const int warp = __ffs(warps) - 1;
        const float* slot =
            (later >> warp & 1) != 0 ? slots_ + group * S::kSlotFloats : own_slot(warp);
        const float2 part = *reinterpret_cast<const float2*>(slot + token * S::kSlotRow + place);
        sum.x += part.x;
        sum.y += part.y;
      }
      store_output_pair(p_, token, (first_strip_ + share_.strips.begin(group)) * 16 + place, sum);
    }
  }

 private:
  // Which warps have items of each strip group, a bit each. Before a block barrier.
  __device__ __forceinline__ void list_contributors(uint32_t* contributors) const {
#pragma unroll 1
    for (int group = warp_; group < share_.strips.parts; group += share_.costs.parts) {
      const bool mine = lane_ < share_.costs.parts &&
                        share_.first_chunk(group, lane_) < share_.first_chunk(group, lane_ + 1);
      const uint32_t bits = __ballot_sync(0xffffffffu, mine);
      if (lane_ == 0) contributors[group] = bits;
    }
  }

  // The next strip group with items of this warp, from `group` + 1 on.
  __device__ __forceinline__ bool next_group(int& group, int& chunk, int& left) const {
    do {
      if (++group >= share_.strips.parts) return false;
      chunk = share_.first_chunk(group, warp_);
      left = share_.first_chunk(group, warp_ + 1) - chunk;
    } while (left <= 0);
    return true;
  }

  // The items of this warp in a strip group of kWidth strips.
  template <int kWidth>
  __device__ __forceinline__ void run_group(int chunk, int left) {
    int quant_group = -1;
    int change_chunk = chunk;
    ChunkGroups groups{0};
#pragma unroll 1
    do {
      ptx::copy_wait<S::kStages - 2>();
      // The slot of the item before is free after this: all lanes have read it.
      __syncwarp();
      if constexpr (S::kShortGroups) {
        multiply<kWidth, Starts::kShort>(stage_, groups);
      } else if constexpr (S::kLongGroups) {
        if (chunk == change_chunk) {
          change_group(stage_.records);
          change_chunk = next_change(w_, chunk);
        }
        multiply<kWidth, Starts::kNone>(stage_, groups);
      } else {
        groups = look_up_chunk_groups(w_, chunk);
        if (groups.first() != quant_group) change_group(stage_.records);
        quant_group = groups.last();
        multiply<kWidth, Starts::kAny>(stage_, groups);
      }
      if (fill_left_ > 0) {
        if (S::kForm == GroupForm::kAny || fill_chunk_ == missing_chunk_) fill_rest(fill_slot_);
        advance_fill();
        if (fill_left_ == 0 && warp_ == 0) ptx::launch_dependents();
      }
      ptx::copy_commit();
      fill_slot_ = stage_;
      stage_ = after(stage_);
      if (stage_.data == ring_end_) stage_ = ring_;
      ++chunk;
    } while (--left > 0);
  }

  // --- filling the ring ---

  __device__ __forceinline__ void start_fill(int group, int chunk, int left) {
    fill_group_ = group;
    fill_chunk_ = chunk;
    fill_left_ = left;
    fill_width_ = share_.strips.size(group);
    // A strip group may reach over the end of a block of features into the next.
    const int first = first_strip_ + share_.strips.begin(group);
    const int block = first / Layout::kBlockStrips;
    const int within = first % Layout::kBlockStrips;
    fill_here_ = Layout::kBlockStrips - within;
    fill_codes_ = reinterpret_cast<const unsigned char*>(w_.codes) +
                  (static_cast<int64_t>(block) * w_.chunks + chunk) * S::kBlockBytes +
                  within * S::kStripBytes + lane_ * 16;
    const int record_group = S::kShortGroups ? record_ / Layout::kBlockStrips : 0;
    const int record_strip = record_ - record_group * Layout::kBlockStrips;
    fill_record_ =
        record_strip < fill_width_ && (!S::kShortGroups || record_group < w_.groups_per_chunk);
    const int strip = first + record_strip;
    fill_records_ =
        w_.groups +
        ((static_cast<int64_t>(strip / Layout::kBlockStrips) * w_.num_groups + record_group) *
             Layout::kBlockStrips +
         strip % Layout::kBlockStrips) *
            w_.record_bytes +
        lane_ * 16 - record_ * w_.record_bytes;
    fill_x_ = static_cast<const T*>(p_.x) + lane_ / 8 * p_.x_stride + lane_ % 8 * 8 +
              static_cast<int64_t>(chunk) * Layout::kChunkRows;
  }

  __device__ __forceinline__ void advance_fill() {
    ++fill_chunk_;
    fill_codes_ += S::kBlockBytes;
    fill_x_ += Layout::kChunkRows;
    if (--fill_left_ > 0) return;
    int group = fill_group_, chunk = 0, left = 0;
    if (next_group(group, chunk, left)) start_fill(group, chunk, left);
  }

  // The first stages: weights, which do not depend on the kernel before, and after the wait for it
  // the rows of x.
  __device__ __forceinline__ void prime(int group, int chunk, int left) {
    constexpr int kAhead = S::kStages - 1;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      start_fill(group, chunk, left);
      fill_slot_ = ring_;
      if (pass == 1) ptx::wait_for_predecessor();
#pragma unroll 1
      for (int stage = 0; stage < kAhead; ++stage) {
        if (fill_left_ > 0) {
          if (pass == 0) {
            fill_weights(fill_slot_, true);
          } else {
            fill_x(fill_slot_, true);
            fill_rest(fill_slot_);
          }
          advance_fill();
        }
        if (pass == 1) ptx::copy_commit();
        fill_slot_ = after(fill_slot_);
      }
    }
    if (fill_left_ <= 0 && warp_ == 0) ptx::launch_dependents();
  }

  __device__ __forceinline__ int group_bytes() const {
    return Layout::kBlockStrips * w_.record_bytes;
  }
  __device__ __forceinline__ Stage after(Stage stage) const {
    return {stage.data + params_.memory.stage_bytes, stage.records + params_.memory.record_bytes};
  }
  __device__ __forceinline__ uint32_t codes(Stage stage) const {
    return stage.data + S::kXBytes + lane_ * 16;
  }
  __device__ __forceinline__ const unsigned char* record_source(int group) const {
    return fill_records_ + static_cast<uint64_t>(static_cast<uint32_t>(group)) *
                               static_cast<uint32_t>(group_bytes());
  }

  __device__ __forceinline__ void fill_weights(Stage slot, bool on) const {
    const uint32_t target = codes(slot);
    const unsigned char* here = fill_codes_;
    const unsigned char* next = here + static_cast<int64_t>(w_.chunks - 1) * S::kBlockBytes;
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
      for (int piece = 0; piece < S::kPieces; ++piece) {
        const int at = s * S::kStripBytes + piece * 512;
        ptx::copy_async_if(on && s < fill_width_, target + at, (s < fill_here_ ? here : next) + at);
      }
    }
    const int group = S::kShortGroups  ? fill_chunk_ * w_.groups_per_chunk
                      : S::kLongGroups ? fill_chunk_ >> w_.chunk_shift
                                       : look_up_chunk_groups(w_, fill_chunk_).first();
    ptx::copy_async_if(on && fill_record_, slot.records + lane_ * 16, record_source(group));
  }

  __device__ __forceinline__ void fill_x(Stage slot, bool on) const {
    const bool there = on && fill_chunk_ * Layout::kChunkRows + lane_ % 8 * 8 < p_.x_columns;
    const uint32_t target = slot.data + x_piece_place(lane_ / 8, lane_ % 8);
#pragma unroll
    for (int i = 0; i < S::kTokens / 4; ++i) {
      // Row 4 of each 8 has bit 2 of its swizzle.
      ptx::copy_async_if(there && i * 4 + lane_ / 8 < p_.m,
                         (i % 2 == 0 ? target : target ^ 64) + i * (4 * kXRowBytes),
                         fill_x_ + i * 4 * p_.x_stride);
    }
  }

  // What few items have: groups that start inside the chunk, columns that x does not have.
  __device__ __forceinline__ void fill_rest(Stage slot) const {
    if constexpr (S::kForm == GroupForm::kAny) {
      const ChunkGroups groups = look_up_chunk_groups(w_, fill_chunk_);
      if (groups.changes() && fill_record_) {
#pragma unroll 1
        for (int i = 1; i < groups.count(); ++i) {
          ptx::copy_async(slot.records + i * group_bytes() + lane_ * 16,
                          record_source(groups.first() + i));
        }
      }
    }
    clear_missing_columns(slot.data, fill_chunk_, p_, S::kTokens, lane_, 32);
  }

  // --- the product ---

  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
      values_.scale[s][0] = values_.scale[s][1] = 0.0f;
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum_[s][t][i] = 0.0f;
          if constexpr (S::kPromotes) part_[s][t][i] = 0.0f;
        }
      }
    }
  }

  // The sums of a group times its scale, into the sums of all.
  __device__ __forceinline__ void finish_group() {
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (S::kPromotes) {
            sum_[s][t][i] = __fmaf_rn(values_.scale[s][i / 2], part_[s][t][i], sum_[s][t][i]);
            part_[s][t][i] = 0.0f;
          } else {
            sum_[s][t][i] = __fmul_rn(values_.scale[s][i / 2], sum_[s][t][i]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void change_group(uint32_t group_records) {
    if constexpr (S::kPromotes) {
      finish_group();
      values_.template load<S::kRecords>(group_records, w_);
    } else {
      float quotient[S::kStrips][2];
      values_.template change<S::kRecords>(group_records, w_, quotient);
#pragma unroll
      for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
        for (int t = 0; t < S::kTokenTiles; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum_[s][t][i] = __fmul_rn(sum_[s][t][i], quotient[s][i / 2]);
        }
      }
    }
  }

  // Where a warp leaves its last sums: at the begin of its own ring. Only one warp can go on from a
  // strip group to the next, and leaves the sums of the first in the slot of that group.
  __device__ __forceinline__ float* own_slot(int warp) const {
    return reinterpret_cast<float*>(shared_ + warp * S::kStages * params_.memory.stage_bytes);
  }

  __device__ __forceinline__ void store_sums(float* target, int width) {
    float* slot = target + lane_ % 4 * (2 * S::kSlotRow) + lane_ / 4;
    __syncwarp();  // the ring is read
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum_[s][t][i] *= ZeroPair<T, S::kBits>::unit(i);
          if (s < width) slot[(t * 8 + i % 2) * S::kSlotRow + s * 16 + i / 2 * 8] = sum_[s][t][i];
          sum_[s][t][i] = 0.0f;
        }
      }
      // Strips that the next strip group adds start from here.
      values_.scale[s][0] = values_.scale[s][1] = 0.0f;
    }
  }

  // Which steps start a group: none after what change_group() did, any, or those of short groups, the first among them.
  enum class Starts { kNone, kAny, kShort };

  template <Starts kStarts>
  __device__ __forceinline__ bool starts(int step, const ChunkGroups& groups) const {
    if (kStarts == Starts::kAny) return step > 0 && groups.starts(step);
    return kStarts == Starts::kShort && starts_short_group(w_, step);
  }

  // The scales and zero points of the group that starts.
  __device__ __forceinline__ void start_group(CodeScales<T, S::kBits> (&scales)[S::kStrips],
                                              uint32_t group_records) {
    if constexpr (S::kScalesCodes) {
#pragma unroll
      for (int s = 0; s < S::kStrips; ++s) {
        scales[s].load(group_records + s * w_.record_bytes, w_.scale_type);
      }
      values_.load_zeros(group_records, w_);
    } else {
      change_group(group_records);
    }
  }

  template <int kWidth, Starts kStarts>
  __device__ __forceinline__ void multiply(Stage stage, const ChunkGroups& groups) {
    constexpr int kPieceSteps = Layout::kChunkSteps / S::kPieces;
    const uint32_t codes_here = codes(stage);
    uint32_t group_records = stage.records;
    CodeScales<T, S::kBits> scales[S::kStrips];
    // Two steps of a tile of 8 tokens are one ldmatrix.
    uint32_t x[2][S::kTokenTiles][4];
    const uint32_t x_row = stage.data + x_piece_place(lane_ % 8, lane_ / 8);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
        ptx::ldmatrix_x4(x[half][t], (x_row ^ (half * 64)) + t * (8 * kXRowBytes));
      }
    }
#pragma unroll
    for (int piece = 0; piece < S::kPieces; ++piece) {
      uint32_t words[kWidth][4];
#pragma unroll
      for (int s = 0; s < kWidth; ++s) {
        const uint4 q = ptx::load_shared_16(codes_here + s * S::kStripBytes + piece * 512);
        words[s][0] = q.x;
        words[s][1] = q.y;
        words[s][2] = q.z;
        words[s][3] = q.w;
      }
      // The copies of an item to come go between the loads and the products of this one.
      if (piece == 0) {
        fill_weights(fill_slot_, fill_left_ > 0);
        fill_x(fill_slot_, fill_left_ > 0);
      }
#pragma unroll
      for (int i = 0; i < kPieceSteps; ++i) {
        const int step = piece * kPieceSteps + i;
        if (starts<kStarts>(step, groups)) {
          if (step > 0) group_records += group_bytes();
          start_group(scales, group_records);
        }
#pragma unroll
        for (int s = 0; s < kWidth; ++s) {
          uint32_t a[4];
          decode(a, &words[s][i * S::kPieces], values_.zero[s], T());
          if constexpr (S::kScalesCodes) scales[s].apply(a);
#pragma unroll
          for (int t = 0; t < S::kTokenTiles; ++t) {
            ptx::mma_m16n8k16<T>(S::kPromotes ? part_[s][t] : sum_[s][t], a,
                                 x[step / 2][t][step % 2 * 2], x[step / 2][t][step % 2 * 2 + 1]);
          }
        }
      }
    }
  }

  const StripParams& params_;
  const GemmProblem& p_;
  const WeightView& w_;
  StripShare share_;
  unsigned char* shared_;
  float* slots_;
  int first_strip_;
  int record_;  // which of a stage's group records this lane copies a part of
  Stage ring_, stage_, fill_slot_;
  uint32_t ring_end_;
  int warp_, lane_;
  int missing_chunk_;  // the chunk that x has only a part of, or -1
  // Where the next copies of this warp come from.
  int fill_group_, fill_chunk_, fill_left_, fill_width_;
  int fill_here_;     // strips in the block of the first
  bool fill_record_;  // this lane copies a part of a record
  const unsigned char* fill_codes_;
  const unsigned char* fill_records_;  // of packed group 0, or of the first that come together
  const T* fill_x_;
  GroupValues<T, S::kBits, S::kStrips> values_;
  float sum_[S::kStrips][S::kTokenTiles][4];
  float part_[S::kPromotes ? S::kStrips : 1][S::kTokenTiles][4];
};

template <class S>
__global__ void __launch_bounds__(S::kMaxWarps * 32)
    strip_gemm(const __grid_constant__ StripParams params) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int warps = blockDim.x / 32;
  auto* slots = reinterpret_cast<float*>(
      shared + warps * S::kStages * (params.memory.stage_bytes + params.memory.record_bytes));
  StripLoop<S> loop(params, shared, slots);
  auto* contributors = reinterpret_cast<uint32_t*>(
      slots + (strip_groups_at_most(params.strips) - 1) * S::kSlotFloats);
  loop.run(contributors);
  __syncthreads();
  loop.store_tile(contributors);
}

}  // namespace marlinq::cuda::sm80
