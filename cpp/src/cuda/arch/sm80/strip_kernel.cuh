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
// strips has 115 clocks of its multiprocessor, 460 instructions, of which decoding and products take
// 180; what is left of the loop must stay small, so all addresses are pointers that advance.
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

template <class T_, int kBits_, int kTokenTiles_, int kMaxWarps_>
struct StripShape {
  using T = T_;
  static constexpr int kBits = kBits_;
  static constexpr int kTokenTiles = kTokenTiles_;
  static constexpr int kTokens = kTokenTiles * 8;
  static constexpr int kMaxWarps = kMaxWarps_;
  static constexpr int kStrips = Layout::kBlockStrips;
  static constexpr int kPieces = kBits / 4;
  static constexpr int kStripBytes = kPieces * 512;  // codes of a strip and chunk
  static constexpr int kBlockBytes = kStrips * kStripBytes;
  static constexpr int kXBytes = kTokens * kXRowBytes;
  // Sums of a warp for a strip group, [token][feature]: the 4 floats between tokens put the 32 lanes
  // of a store into 32 banks.
  static constexpr int kSlotRow = kStrips * 16 + 4;
  static constexpr int kSlotFloats = kTokens * kSlotRow;
};

/// How the strips of a block make strip groups, and their items are divided among its warps.
struct StripShare {
  EvenShare strips;  // over the strip groups
  EvenShare costs;   // over the warps; an item costs its strips
  int chunks = 0;

  StripShare() = default;
  StripShare(int block_strips, int num_chunks, int warps)
      : strips(block_strips, (block_strips + Layout::kBlockStrips - 1) / Layout::kBlockStrips),
        costs(block_strips * num_chunks, warps),
        chunks(num_chunks) {}

  /// First chunk of a strip group that belongs to `warp` or a later one.
  __device__ __forceinline__ int first_chunk(int group, int warp) const {
    const int rest = costs.begin(warp) - strips.begin(group) * chunks;
    return rest <= 0 ? 0 : min(divide_up(rest, strips.size(group)), chunks);
  }

 private:
  // By 1 to 4, without a division.
  __device__ __forceinline__ static int divide_up(int value, int by) {
    const unsigned int sum = value + by - 1;
    return static_cast<int>(by == 3 ? __umulhi(sum, 0xaaaaaaabu) >> 1 : sum >> (by >> 1));
  }
};

struct StripParams {
  GemmProblem problem;
  EvenShare strips;     // over the blocks
  StripShare share[2];  // of a block with strips.least strips, and with one more
  int stages;
  int stage_bytes;
  int width;  // strips of the widest strip group, which a stage holds
};

template <class S>
class StripLoop {
 public:
  using T = typename S::T;

  __device__ __forceinline__ StripLoop(const StripParams& params, unsigned char* shared,
                                       float* slots)
      : params_(params),
        p_(params.problem),
        w_(params.problem.weight),
        share_(params.share[blockIdx.x < params.strips.rest ? 1 : 0]),
        first_strip_(params.strips.begin(blockIdx.x)),
        slots_(slots) {
    warp_ = threadIdx.x / 32;
    lane_ = threadIdx.x % 32;
    ring_ = ptx::shared_address(shared) + warp_ * params.stages * params.stage_bytes;
    ring_end_ = ring_ + params.stages * params.stage_bytes;
    const int record_pieces = w_.record_bytes / 16;
    record_strip_ = lane_ / record_pieces;
    record_piece_ = lane_ % record_pieces;
#pragma unroll
    for (int i = 0; i < kXRows; ++i) {
      x_rows_[i] = static_cast<const T*>(p_.x) + (i * 4 + lane_ / 8) * p_.x_stride + lane_ % 8 * 8;
    }
  }

  __device__ __forceinline__ void run() {
    fill_.group = -1;
    bool filling = next_fill_group();
    const bool any = filling;
    int group = fill_.group;
    int chunk = fill_.chunk;
    int left = fill_.left;
    int width = fill_.width;
    // Codes and records of the first stages, then the rows of x that go with them.
    const int ahead = params_.stages - 1;
    uint32_t slot = ring_;
    XStart starts[ptx::kMaxStages - 1];
#pragma unroll
    for (int stage = 0; stage < ptx::kMaxStages - 1; ++stage) {
      starts[stage] = {fill_.chunk, filling && stage < ahead};
      if (starts[stage].on) {
        fill_weights(slot, true);
        fill_more_records(slot);
        filling = advance_fill();
      }
      slot += params_.stage_bytes;
    }
    clear_x();
    ptx::wait_for_predecessor();
    slot = ring_;
#pragma unroll
    for (int stage = 0; stage < ptx::kMaxStages - 1; ++stage) {
      fill_x(slot, starts[stage].chunk, starts[stage].on);
      if (stage < ahead) ptx::copy_commit();
      slot += params_.stage_bytes;
    }
    if (!filling && warp_ == 0) ptx::launch_dependents();
    if (!any) return;
    clear_sums();
    values_.set_middle(w_);
    quant_group_ = -1;
    uint32_t stage = ring_;
    fill_slot_ = ring_ + ahead * params_.stage_bytes;
    filling_ = filling;
    while (true) {
      ptx::copy_wait_stage(params_.stages);
      // The slot of the item before is free after this: all lanes have read it.
      __syncwarp();
      const ChunkGroups groups = load_chunk_groups(w_, chunk);
      switch (width) {
        case 1:
          multiply<1>(stage, groups);
          break;
        case 2:
          multiply<2>(stage, groups);
          break;
        case 3:
          multiply<3>(stage, groups);
          break;
        default:
          multiply<4>(stage, groups);
      }
      if (filling_) fill_more_records(fill_slot_);
      ptx::copy_commit();
      fill_slot_ = stage;
      stage += params_.stage_bytes;
      if (stage == ring_end_) stage = ring_;
      if (filling_ && !advance_fill()) {
        filling_ = false;
        if (warp_ == 0) ptx::launch_dependents();
      }
      ++chunk;
      if (--left == 0) {
        finish_group<S::kStrips>();
        store_sums(group);
        quant_group_ = -1;
        if (!next_group(group, chunk, left)) break;
        width = share_.strips.size(group);
      }
    }
  }

  /// Which warps have items of each strip group, a bit each. Before a block barrier.
  __device__ __forceinline__ void list_contributors(uint32_t* contributors) const {
    const int warps = share_.costs.parts;
    for (int group = threadIdx.x; group < share_.strips.parts; group += blockDim.x) {
      uint32_t bits = 0;
      for (int warp = 0; warp < warps; ++warp) {
        if (share_.first_chunk(group, warp) < share_.first_chunk(group, warp + 1)) bits |= 1u << warp;
      }
      contributors[group] = bits;
    }
  }

  /// Adds what the warps left, in their order, and writes the output. After a block barrier. A warp
  /// takes a token of a strip group at a time, a lane two features.
  __device__ __forceinline__ void store_tile(const uint32_t* contributors) const {
    const int groups = share_.strips.parts;
    const int units = groups * p_.m;
    for (int unit = warp_; unit < units; unit += share_.costs.parts) {
      const int token = unit / groups;
      const int group = unit % groups;
      const int place = lane_ * 2;
      if (place >= share_.strips.size(group) * 16) continue;
      float2 sum = make_float2(0.0f, 0.0f);
      for (uint32_t warps = contributors[group]; warps != 0; warps &= warps - 1) {
        const int warp = __ffs(warps) - 1;
        const float2 part = *reinterpret_cast<const float2*>(
            slots_ + (group + warp) * S::kSlotFloats + token * S::kSlotRow + place);
        sum.x += part.x;
        sum.y += part.y;
      }
      const int feature = (first_strip_ + share_.strips.begin(group)) * 16 + place;
      if (feature < w_.n) store_output(p_, token, feature, sum.x);
      if (feature + 1 < w_.n) store_output(p_, token, feature + 1, sum.y);
    }
  }

 private:
  static constexpr int kXRows = S::kTokens / 4;  // pieces of x a lane copies for an item

  struct XStart {
    int chunk;
    bool on;
  };

  // Where the next copies of this warp come from.
  struct Fill {
    int group;  // strip group
    int chunk;
    int left;   // chunks of this warp in the strip group
    int width;  // strips
    const unsigned char* codes[S::kStrips];
    const unsigned char* records;  // of packed group 0, for this lane
  };

  // The next strip group with items of this warp, from `group` + 1 on.
  __device__ __forceinline__ bool next_group(int& group, int& chunk, int& left) const {
    do {
      if (++group >= share_.strips.parts) return false;
      chunk = share_.first_chunk(group, warp_);
      left = share_.first_chunk(group, warp_ + 1) - chunk;
    } while (left <= 0);
    return true;
  }

  __device__ __forceinline__ bool next_fill_group() {
    if (!next_group(fill_.group, fill_.chunk, fill_.left)) return false;
    fill_.width = share_.strips.size(fill_.group);
    const int first = first_strip_ + share_.strips.begin(fill_.group);
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
      const int strip = first + s;
      const int64_t block_chunk =
          static_cast<int64_t>(strip / Layout::kBlockStrips) * w_.chunks + fill_.chunk;
      fill_.codes[s] = reinterpret_cast<const unsigned char*>(w_.codes) +
                       block_chunk * S::kBlockBytes +
                       strip % Layout::kBlockStrips * S::kStripBytes + lane_ * 16;
    }
    const int strip = first + record_strip_;
    fill_.records = w_.groups +
                    (static_cast<int64_t>(strip / Layout::kBlockStrips) * w_.num_groups *
                         Layout::kBlockStrips +
                     strip % Layout::kBlockStrips) *
                        w_.record_bytes +
                    record_piece_ * 16;
    return true;
  }

  __device__ __forceinline__ bool advance_fill() {
    ++fill_.chunk;
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) fill_.codes[s] += S::kBlockBytes;
    return --fill_.left > 0 || next_fill_group();
  }

  __device__ __forceinline__ uint32_t records(uint32_t stage) const {
    return stage + S::kXBytes + params_.width * S::kStripBytes;
  }

  __device__ __forceinline__ void fill_weights(uint32_t slot, bool on) const {
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
      for (int piece = 0; piece < S::kPieces; ++piece) {
        ptx::copy_async_if(on && s < fill_.width,
                           slot + S::kXBytes + s * S::kStripBytes + piece * 512 + lane_ * 16,
                           fill_.codes[s] + piece * 512);
      }
    }
    const int group = load_chunk_groups(w_, fill_.chunk).first();
    ptx::copy_async_if(on && record_strip_ < fill_.width, record_target(slot),
                       fill_.records + static_cast<int64_t>(group) * group_bytes());
  }

  // Of groups that start inside the chunk.
  __device__ __forceinline__ void fill_more_records(uint32_t slot) const {
    const ChunkGroups groups = load_chunk_groups(w_, fill_.chunk);
    if (!groups.changes() || record_strip_ >= fill_.width) return;
    for (int i = 1; i < groups.count(); ++i) {
      ptx::copy_async(record_target(slot) + i * params_.width * w_.record_bytes,
                      fill_.records + static_cast<int64_t>(groups.first() + i) * group_bytes());
    }
  }

  __device__ __forceinline__ int group_bytes() const {
    return Layout::kBlockStrips * w_.record_bytes;
  }
  __device__ __forceinline__ uint32_t record_target(uint32_t slot) const {
    return records(slot) + record_strip_ * w_.record_bytes + record_piece_ * 16;
  }

  __device__ __forceinline__ void fill_x(uint32_t slot, int chunk, bool on) const {
    const int column = chunk * Layout::kChunkRows;
    const int bytes = x_piece_bytes(p_, column + lane_ % 8 * 8);
#pragma unroll
    for (int i = 0; i < kXRows; ++i) {
      const int token = i * 4 + lane_ / 8;
      ptx::copy_async_zfill_if(on && token < p_.m, slot + x_piece_place(token, lane_ % 8),
                               x_rows_[i] + column, bytes);
    }
  }

  // Rows of x beyond m stay 0 in every slot.
  __device__ __forceinline__ void clear_x() const {
    for (uint32_t slot = ring_; slot != ring_end_; slot += params_.stage_bytes) {
      for (int piece = p_.m * 8 + lane_; piece < S::kTokens * 8; piece += 32) {
        ptx::store_shared_16(slot + piece * 16, make_uint4(0, 0, 0, 0));
      }
    }
  }

  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
      values_.scale[s][0] = values_.scale[s][1] = 0.0f;
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum_[s][t][i] = part_[s][t][i] = 0.0f;
      }
    }
  }

  template <int kWidth>
  __device__ __forceinline__ void finish_group() {
#pragma unroll
    for (int s = 0; s < kWidth; ++s) {
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum_[s][t][i] = __fmaf_rn(values_.scale[s][i / 2], part_[s][t][i], sum_[s][t][i]);
          part_[s][t][i] = 0.0f;
        }
      }
    }
  }

  __device__ __forceinline__ void store_sums(int group) {
    float* slot = slots_ + (group + warp_) * S::kSlotFloats;
    const int width = share_.strips.size(group);
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
        const int feature = s * 16 + lane_ / 4;
        const int token = t * 8 + 2 * (lane_ % 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (s < width) slot[(token + i % 2) * S::kSlotRow + feature + 8 * (i / 2)] = sum_[s][t][i];
          sum_[s][t][i] = 0.0f;
        }
      }
    }
  }

  // One item: groups that start inside the chunk are rare, and cost code of their own.
  template <int kWidth>
  __device__ __forceinline__ void multiply(uint32_t stage, const ChunkGroups& groups) {
    if (groups.first() != quant_group_) {
      finish_group<kWidth>();
      values_.template load<kWidth>(records(stage), w_);
    }
    quant_group_ = groups.last();
    if (groups.changes()) {
      multiply_steps<kWidth, true>(stage, groups);
    } else {
      multiply_steps<kWidth, false>(stage, groups);
    }
  }

  template <int kWidth, bool kChanges>
  __device__ __forceinline__ void multiply_steps(uint32_t stage, const ChunkGroups& groups) {
    constexpr int kPieceSteps = Layout::kChunkSteps / S::kPieces;
    const uint32_t codes = stage + S::kXBytes + lane_ * 16;
    uint32_t group_records = records(stage);
    // Two steps of a tile of 8 tokens are one ldmatrix.
    uint32_t x[2][S::kTokenTiles][4];
    const uint32_t x_row = stage + x_piece_place(lane_ % 8, lane_ / 8);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
        ptx::ldmatrix_x4(x[half][t], (x_row ^ (half * 64)) + t * (8 * kXRowBytes));
      }
    }
    // The copies of an item to come go between the loads and the products of this one.
    fill_weights(fill_slot_, filling_);
    fill_x(fill_slot_, fill_.chunk, filling_);
#pragma unroll
    for (int piece = 0; piece < S::kPieces; ++piece) {
      uint32_t words[kWidth][4];
#pragma unroll
      for (int s = 0; s < kWidth; ++s) {
        const uint4 q = ptx::load_shared_16(codes + s * S::kStripBytes + piece * 512);
        words[s][0] = q.x;
        words[s][1] = q.y;
        words[s][2] = q.z;
        words[s][3] = q.w;
      }
#pragma unroll
      for (int i = 0; i < kPieceSteps; ++i) {
        const int step = piece * kPieceSteps + i;
        if (kChanges && step > 0 && groups.starts(step)) {
          finish_group<kWidth>();
          group_records += params_.width * w_.record_bytes;
          values_.template load<kWidth>(group_records, w_);
        }
#pragma unroll
        for (int s = 0; s < kWidth; ++s) {
          uint32_t a[4];
          decode(a, &words[s][i * S::kPieces], values_.zero[s], T());
#pragma unroll
          for (int t = 0; t < S::kTokenTiles; ++t) {
            ptx::mma_m16n8k16<T>(part_[s][t], a, x[step / 2][t][step % 2 * 2],
                                 x[step / 2][t][step % 2 * 2 + 1]);
          }
        }
      }
    }
  }

  const StripParams& params_;
  const GemmProblem& p_;
  const WeightView& w_;
  const StripShare& share_;
  int first_strip_;
  float* slots_;
  uint32_t ring_, ring_end_, fill_slot_;
  int warp_, lane_, record_strip_, record_piece_;
  int quant_group_;
  bool filling_;
  Fill fill_;
  const T* x_rows_[kXRows];
  GroupValues<T, S::kBits, S::kStrips> values_;
  float sum_[S::kStrips][S::kTokenTiles][4];
  float part_[S::kStrips][S::kTokenTiles][4];
};

template <class S>
__global__ void __launch_bounds__(S::kMaxWarps * 32)
    strip_gemm(const __grid_constant__ StripParams params) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int warps = blockDim.x / 32;
  auto* slots = reinterpret_cast<float*>(shared + warps * params.stages * params.stage_bytes);
  const int groups = params.share[blockIdx.x < params.strips.rest ? 1 : 0].strips.parts;
  auto* contributors = reinterpret_cast<uint32_t*>(slots + (groups + warps - 1) * S::kSlotFloats);
  StripLoop<S> loop(params, shared, slots);
  loop.run();
  loop.list_contributors(contributors);
  __syncthreads();
  loop.store_tile(contributors);
}

}  // namespace marlinq::cuda::sm80
