// The product over experts: the loop of tile_loop.cuh over token tiles of which each meets the weight
// of its own expert.
//
// How many tiles there are is known to the device alone. So a block first reads it and works out by
// itself what plan() does for a dense layer: how many whole tiles each block has, and into how many
// parts the tiles that are left are cut (ExpertCost). Which rows a tile holds is written into tables
// in shared memory when the filling of its stages begins, and read again when it is stored.
//
// A tile multiplies as many of its token tiles as have rows. With two halves of features that meet in
// an activation, a warp takes two strips of the first half and the same two of the second, so that
// both inputs of an output are sums of one thread.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/arch/sm80/expert_fill.cuh"
#include "cuda/arch/sm80/expert_output.cuh"
#include "cuda/arch/sm80/expert_tiles.cuh"
#include "cuda/arch/sm80/experts.hpp"
#include "cuda/arch/sm80/plan.hpp"
#include "cuda/arch/sm80/tile_loop.cuh"
#include "cuda/problem.hpp"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/launch.cuh"

namespace marlinq::cuda::sm80 {

/// The tiles of a kernel, for use from shared memory: lists are copied there, tiles in the kernel's
/// parameters are pointed at.
template <class Rows>
class NearRows {
 public:
  __device__ __forceinline__ void set(const Rows& rows) { rows_ = rows; }
  __device__ __forceinline__ const Rows& get() const { return rows_; }

 private:
  Rows rows_;
};
template <>
class NearRows<DispatchedTiles> {
 public:
  __device__ __forceinline__ void set(const DispatchedTiles& rows) { rows_ = &rows; }
  __device__ __forceinline__ const DispatchedTiles& get() const { return *rows_; }

 private:
  const DispatchedTiles* rows_;
};

/// The rows of a tile and where its weights are, in shared memory: for the segment that is multiplied,
/// those that the ring holds ahead of it, and the one after them.
template <class S>
struct SegmentTables {
  static constexpr int kCount = S::kStages + 1;
  static constexpr uint32_t kNoRow = 0xffffffffu;
  static constexpr int kMasks = (S::kTokens + 31) / 32;

  TilePosition at[kCount];
  int expert[kCount];
  uint32_t codes[kCount][S::kFeatureWarps];        // pieces of 16 bytes before the first chunk, ...
  uint32_t upper_codes[kCount][S::kFeatureWarps];  // ... as TileLoop wants them
  uint32_t records[kCount][S::kFeatureWarps];
  uint32_t upper_records[kCount][S::kFeatureWarps];  // further than those of the lower strips
  uint32_t x[kCount][S::kTokens];                    // the row's first piece, or kNoRow
  int y[kCount][S::kTokens];                         // row of the output; negative: none
  float weight[kCount][S::kTokens];
  uint32_t present[kCount][kMasks];
};

/// What a block needs to find its segments, in shared memory, out of the way of the loop's registers.
/// For few tokens segments are looked up by a function that is called: were it part of the loop, in the
/// several places that go on to a next segment, a kernel of some microseconds would wait for its own
/// instructions. The registers of many tokens leave no room for a call.
template <class S, class Rows>
struct SegmentWalk {
  const ExpertParams<Rows>* params;
  NearRows<Rows> rows;
  SegmentTables<S>* tables;
  TileCutsBy<PlainDivider> tail;
  int whole_tiles;
  bool in_tail;        // this block has a run of the tail's chunks ...
  int run_begin;       // ... from here
  int run_end;         // to here, ...
  int last_tail_tile;  // ... in this tile
  int token_tiles;
  int chunks;
  int features;  // n
  int num_experts;
  int num_groups;
  int record_pieces;  // of 16 bytes, of one strip and group
  Divider feature_tiles;
  int64_t x_stride;
  int64_t expert_bytes;
  const float* weights;
  bool activates;

  __device__ __forceinline__ bool has_segment(int segment) const {
    return segment < whole_tiles ||
           (in_tail && (last_tail_tile - (segment - whole_tiles) + 1) * chunks > run_begin);
  }

  __device__ __forceinline__ TilePosition position(int segment) const {
    TilePosition at;
    int tile = segment * gridDim.x + blockIdx.x;
    at.begin = 0;
    at.end = chunks;
    if (segment >= whole_tiles) {
      // The last of a run's tiles first.
      at.tail_tile = last_tail_tile - (segment - whole_tiles);
      tile = whole_tiles * gridDim.x + at.tail_tile;
      at.begin = max(run_begin - at.tail_tile * chunks, 0);
      at.end = min(run_end - at.tail_tile * chunks, chunks);
    }
    at.length = (at.end - at.begin + S::kRowWarps - 1) / S::kRowWarps;
    place_tile(at, tile);
    return at;
  }

 private:
  // Token tiles of one expert that stand side by side in an aligned group of 8 are walked through
  // before the next feature tile, so that they share its weights.
  __device__ __forceinline__ void place_tile(TilePosition& at, int tile) const {
    constexpr int kBand = 8;
    const int token_tile = feature_tiles.divide(tile);
    const int first = token_tile / kBand * kBand;
    const int here = token_tile - first;
    const int other = first + static_cast<int>(threadIdx.x) % kBand;
    const int expert = rows.get().expert(token_tile);
    const bool same = other < token_tiles && rows.get().expert(other) == expert;
    const uint32_t mask = __ballot_sync(0xffffffffu, same) & 0xff;
    const uint32_t below = ~mask & ((1u << here) - 1);
    const int begin = 32 - __clz(below);
    const int width = __ffs(~(mask >> begin)) - 1;
    const int within = tile - (first + begin) * feature_tiles.divisor;
    at.feature_tile = width == 1 ? within : within / width;
    at.token_tile = first + begin + within - at.feature_tile * width;
  }
};

/// By one warp: each lane weighs one way to share the tiles that are left after whole ones.
template <class S, class Rows>
__device__ __noinline__ void plan_walk(SegmentWalk<S, Rows>& walk,
                                       const ExpertParams<Rows>& params) {
  const WeightView& w = params.problem.weight;
  const int lane = threadIdx.x % 32;
  const int blocks = gridDim.x;
  const int token_tiles = params.rows.count();
  const int tiles = token_tiles * params.feature_tiles.divisor;
  const int waves = params.blocks.divide(tiles);
  const int left = tiles - waves * blocks;
  // Blocks a tile; the last lane has all blocks, with runs that cross from a tile into the next. A run of
  // less than two chunks is not worth handing over.
  const int most = min(blocks, left * w.chunks / 2);
  const bool all = lane == 31;
  const int tail = all ? most : left * (lane + 1);
  const bool possible = lane == 0 || (params.may_cut && tail > left && tail <= most);
  float cost = INFINITY;
  if (possible && (params.share == 0 || lane == params.share - 1)) {
    const float each = ptx::divide_roughly(static_cast<float>(tail), static_cast<float>(left));
    const int sms = params.multiprocessors;
    const int together = (tail > sms) + (tail > 2 * sms) + (tail > 3 * sms);
    cost = ptx::divide_roughly(static_cast<float>(w.chunks), each) *
           params.cost.step[min(together, S::kBlocksTogether - 1)];
    if (tail > left) cost += params.cost.cut + each * params.cost.part;
    if (all) cost += params.cost.uneven;
  }
  // Costs are positive, so that their bits are in their order.
  const uint32_t key = (__float_as_uint(cost) & ~31u) | lane;
  const int chosen = __reduce_min_sync(0xffffffffu, key) & 31;
  const bool crosses = chosen == 31;
  const int range_blocks = crosses ? most : chosen + 1;
  const int tail_blocks = crosses ? most : left * range_blocks;
  if (lane != 0) return;
  walk.whole_tiles = waves;
  walk.in_tail = blockIdx.x < tail_blocks;
  walk.tail.blocks = PlainDivider(range_blocks);
  walk.tail.chunks = PlainDivider(crosses ? left * w.chunks : w.chunks);
  const EvenShare runs(walk.tail.chunks.divisor, range_blocks);
  walk.tail.runs = runs;
  walk.tail.larger_run = PlainDivider(runs.least + 1);
  walk.tail.smaller_run = PlainDivider(runs.least);
  if (walk.in_tail) {
    const int range = walk.tail.blocks.divide(blockIdx.x);
    const int within = blockIdx.x - range * range_blocks;
    walk.run_begin = range * walk.tail.chunks.divisor + runs.begin(within);
    walk.run_end = walk.run_begin + runs.size(within);
    walk.last_tail_tile = params.chunks.divide(walk.run_end - 1);
  }
  walk.token_tiles = token_tiles;
}

/// What is known without a look at the lists; by another warp.
template <class S, class Rows>
__device__ __forceinline__ void describe_walk(SegmentWalk<S, Rows>& walk, SegmentTables<S>& tables,
                                              const ExpertParams<Rows>& params) {
  const WeightView& w = params.problem.weight;
  walk.params = &params;
  walk.rows.set(params.rows);
  walk.tables = &tables;
  walk.chunks = w.chunks;
  walk.features = w.n;
  walk.num_experts = params.num_experts;
  walk.num_groups = w.num_groups;
  walk.record_pieces = w.record_bytes / 16;
  walk.feature_tiles = params.feature_tiles;
  walk.x_stride = params.problem.x_stride;
  walk.expert_bytes = params.expert_bytes;
  walk.weights = params.weights;
  walk.activates = params.activates;
}

/// Writes the rows of a tile and its weights' places into a table; by all threads, before a barrier.
template <class S, class Rows>
__device__ __forceinline__ void write_table(const SegmentWalk<S, Rows>& walk, int table,
                                            const TilePosition& at, int expert) {
  SegmentTables<S>& tables = *walk.tables;
  const int thread = threadIdx.x;
  if (thread < S::kFeatureWarps) {
    const WarpStrips strips(at.feature_tile * S::kFeatureWarps + thread, walk.features,
                            walk.activates);
    const auto codes_of = [&](int strip) { return strip_codes<S>(strip, walk.chunks, at.begin); };
    const auto records_of = [&](int strip) {
      return strip_records(strip, walk.num_groups, walk.record_pieces);
    };
    const auto base = static_cast<uint32_t>(expert * (walk.expert_bytes / 16));
    tables.codes[table][thread] = base + codes_of(strips.lower);
    tables.records[table][thread] = base + records_of(strips.lower);
    if (thread == 0) {
      tables.at[table] = at;
      tables.expert[table] = expert;
    }
    constexpr int kHalf = Layout::kBlockStrips / 2;
    tables.upper_codes[table][thread] =
        codes_of(strips.upper) - codes_of(strips.lower) - kHalf * (S::kStripBytes / 16);
    tables.upper_records[table][thread] =
        records_of(strips.upper) - records_of(strips.lower) - kHalf * walk.record_pieces;
  }
  if (thread >= SegmentTables<S>::kMasks * 32) return;
  RowPlace place;
  if (thread < S::kTokens) {
    const Rows& rows = walk.rows.get();
    const auto entries = rows.entries();
    place = rows.row(entries, rows.tile(entries, at.token_tile, S::kTokens), thread);
  }
  const uint32_t present = __ballot_sync(0xffffffffu, place.x >= 0);
  if (thread % 32 == 0) tables.present[table][thread / 32] = present;
  if (thread >= S::kTokens) return;
  tables.x[table][thread] =
      place.x < 0 ? SegmentTables<S>::kNoRow : static_cast<uint32_t>(place.x * walk.x_stride / 8);
  tables.y[table][thread] = place.y;
  tables.weight[table][thread] =
      walk.weights != nullptr && place.x >= 0 ? walk.weights[place.weight] : 1.0f;
}

/// A segment whose expert is not here. Called with little, for the sake of the loop's registers.
template <class S, class Rows>
__device__ __noinline__ void store_zeros(const SegmentWalk<S, Rows>& walk, int segment) {
  const TilePosition at = walk.position(segment);
  if (at.end != walk.chunks) return;
  const Rows& rows = walk.rows.get();
  const auto entries = rows.entries();
  store_zero_rows(*walk.params, entries, rows.tile(entries, at.token_tile, S::kTokens), S::kTokens,
                  at.feature_tile * S::kFeatureWarps, S::kFeatureWarps, threadIdx.x, S::kThreads);
}

/// Finds the next segment with an expert, from `segment` on, and writes its table. Returns its number, or
/// -1. By all threads; their tables are there on return.
template <class S, class Rows>
__device__ __forceinline__ int find_segment(const SegmentWalk<S, Rows>& walk, int segment,
                                            int table) {
  for (; walk.has_segment(segment); ++segment) {
    const TilePosition at = walk.position(segment);
    const int expert = walk.rows.get().expert(at.token_tile);
    if (static_cast<uint32_t>(expert) < static_cast<uint32_t>(walk.num_experts)) {
      write_table(walk, table, at, expert);
      __syncthreads();
      return segment;
    }
    store_zeros(walk, segment);
  }
  return -1;
}

/// The same, called: see SegmentWalk.
template <class S, class Rows>
__device__ __noinline__ int call_find_segment(const SegmentWalk<S, Rows>& walk, int segment,
                                              int table) {
  return find_segment(walk, segment, table);
}

template <class S, class Rows>
class ExpertLoop : public ExpertFill<S, Rows, ExpertLoop<S, Rows>> {
  using Fill = ExpertFill<S, Rows, ExpertLoop<S, Rows>>;
  using Loop = TileLoop<S, ExpertLoop<S, Rows>>;
  friend Fill;
  friend Loop;

 public:
  using T = typename S::T;

  __device__ __forceinline__ ExpertLoop(const ExpertParams<Rows>& params, unsigned char* shared,
                                        SegmentWalk<S, Rows>& walk)
      : Fill(params, shared),
        walk_(walk),
        tables_(*reinterpret_cast<SegmentTables<S>*>(shared + S::kStages * S::kRowWarps *
                                                                  params.slice_bytes)) {
    if (threadIdx.x == 32) describe_walk(walk, tables_, params);
    if (!params.settled) ptx::wait_for_predecessor();
    params.rows.prefetch(blockIdx.x, params.feature_tiles);
    if (threadIdx.x < 32) plan_walk(walk, params);
    __syncthreads();
  }

  __device__ __forceinline__ void run() {
    this->prime();
    values_.set_middle(w_);
    uint32_t stage = ring_;
    for (int segment = 0; segment < found_; ++segment) {
      next_table(table_);
      clear();
      token_tiles_ = active_tiles();
      const TilePosition& at = tables_.at[table_];
      stage = multiply(stage, this->first_chunk(at), this->chunks_of(at));
      finish();
    }
  }

 private:
  using Fill::params_;
  using Loop::clear, Loop::finish_sums, Loop::group_bytes, Loop::piece_at, Loop::unit_token;
  using Loop::feature_warp_, Loop::fill_chunk_, Loop::fill_codes_, Loop::fill_left_,
      Loop::fill_records_, Loop::fill_segment_, Loop::fill_x_, Loop::fill_x_on_,
      Loop::fill_x_place_, Loop::lane_, Loop::p_, Loop::ring_, Loop::sum_, Loop::values_, Loop::w_;
  static_assert(S::kRowWarps == 1);

  __device__ __forceinline__ static void next_table(int& table) {
    table = table + 1 == SegmentTables<S>::kCount ? 0 : table + 1;
  }
  __device__ __forceinline__ ChunkGroups groups_to_fill(int chunk) const {
    return expert_chunk_groups(params_, tables_.expert[fill_table_], chunk);
  }
  __device__ __forceinline__ ChunkGroups groups_of(int chunk) const {
    return expert_chunk_groups(params_, tables_.expert[table_], chunk);
  }

  // --- filling the ring ---

  __device__ __forceinline__ void find_weights() { start_fill(0); }
  __device__ __forceinline__ void find_rows() const {}
  __device__ __forceinline__ void start_fill(int segment) {
    fill_left_ = 0;
    int table = fill_table_;
    next_table(table);
    if constexpr (S::kTokenTiles <= 2) {
      fill_segment_ = call_find_segment(walk_, segment, table);
    } else {
      fill_segment_ = find_segment(walk_, segment, table);
    }
    if (fill_segment_ < 0) return;
    fill_table_ = table;
    ++found_;
    const TilePosition& at = tables_.at[table];
    fill_left_ = this->chunks_of(at);
    fill_chunk_ = this->first_chunk(at);
    fill_codes_ = tables_.codes[table][feature_warp_] + lane_ +
                  (fill_chunk_ - at.begin) * (S::kBlockBytes / 16);
    upper_codes_ = tables_.upper_codes[table][feature_warp_];
    fill_records_ =
        tables_.records[table][feature_warp_] + lane_ +
        (this->copies_lower_records() ? 0 : tables_.upper_records[table][feature_warp_]);
    fill_x_ = fill_chunk_ * (Layout::kChunkRows / 8) + threadIdx.x % 8;
  }

  __device__ __forceinline__ uint32_t upper_codes() const { return upper_codes_; }

  __device__ __forceinline__ void fill_x(uint32_t slot, bool on) const {
    constexpr int kRowStep = S::kGroupThreads / 8;
    static_assert(kRowStep % 8 == 0 || kRowStep == 4, "the swizzle repeats every 8 rows");
    const int row = threadIdx.x % S::kGroupThreads / 8;
    const bool there = on && fill_x_on_ && row < S::kTokens;
    const uint32_t* rows = tables_.x[fill_table_] + (row < S::kTokens ? row : 0);
#pragma unroll
    for (int i = 0; i < (S::kTokens + kRowStep - 1) / kRowStep; ++i) {
      const uint32_t first = rows[i * kRowStep];
      // Row 4 of each 8 has bit 2 of its swizzle.
      const int place = kRowStep == 4 && i % 2 == 1 ? fill_x_place_ ^ 64 : fill_x_place_;
      ptx::copy_async_if(there && first != SegmentTables<S>::kNoRow,
                         slot + place + i * (kRowStep * kXRowBytes),
                         piece_at(p_.x, first + fill_x_));
    }
  }

  // --- the product ---

  // Token tiles with rows, up to the last of them.
  __device__ __forceinline__ int active_tiles() const {
    int rows = 0;
#pragma unroll
    for (int i = 0; i < SegmentTables<S>::kMasks; ++i) {
      const uint32_t present = tables_.present[table_][i];
      if (present != 0) rows = i * 32 + 32 - __clz(present);
    }
    return (rows + 7) / 8;
  }

  __device__ __forceinline__ uint32_t multiply(uint32_t stage, int begin, int length) {
    // For groups that are not of whole chunks there is one loop: one for each number of token tiles would be
    // most of the kernel.
    if constexpr (S::kForm == GroupForm::kAny) {
      if (w_.chunk_shift < 0)
        return this->template multiply_any_groups<S::kTokenTiles>(stage, begin, length);
    }
    if constexpr (S::kBits == 4) {
      if constexpr (S::kTokenTiles > 1) {
        if (token_tiles_ <= 1) return multiply_even_groups<1>(stage, begin, length);
      }
      if constexpr (S::kTokenTiles > 2) {
        if (token_tiles_ <= 2) return multiply_even_groups<2>(stage, begin, length);
      }
      if constexpr (S::kTokenTiles > 4) {
        if (token_tiles_ <= 4) return multiply_even_groups<4>(stage, begin, length);
      }
    }
    return multiply_even_groups<S::kTokenTiles>(stage, begin, length);
  }

  template <int kActive>
  __device__ __forceinline__ uint32_t multiply_even_groups(uint32_t stage, int begin, int length) {
    if constexpr (S::kForm == GroupForm::kShort) {
      return this->template multiply_short_groups<kActive>(stage, length);
    } else {
      return this->template multiply_long_groups<kActive>(stage, begin, length);
    }
  }

  // --- the end of a segment ---

  __device__ __forceinline__ bool is_unit(int unit) const {
    return unit_token(unit) < token_tiles_ * 8;
  }

  __device__ __forceinline__ void finish() {
    const TilePosition& at = tables_.at[table_];
    finish_sums();
    if (at.end < w_.chunks) {
      this->leave_part();
      return;
    }
    if (at.begin > 0) this->add_parts(walk_.tail.block_of(at.tail_tile * w_.chunks));
    const int features = output_features(params_);
    const int feature = (at.feature_tile * S::kFeatureWarps + feature_warp_) * features;
    ExpertOutput<T, S::kTokenTiles, ExpertParams<Rows>>(params_, sum_, tables_.y[table_],
                                                        tables_.weight[table_], token_tiles_)
        .store(feature, feature + features, tables_.expert[table_]);
  }

  SegmentWalk<S, Rows>& walk_;
  SegmentTables<S>& tables_;
  int found_ = 0;        // segments that have been started to be filled
  int table_ = -1;       // of the segment that is multiplied
  int fill_table_ = -1;  // of the segment that is filled
  int token_tiles_ = 0;  // that have rows, of the segment that is multiplied
  uint32_t upper_codes_ = 0;
};

template <class S, class Rows>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksTogether)
    expert_gemm(const __grid_constant__ ExpertParams<Rows> params) {
  extern __shared__ __align__(128) unsigned char shared[];
  static_assert(sizeof(SegmentWalk<S, Rows>) <= kExpertStaticShared);
  __shared__ __align__(16) unsigned char walk[sizeof(SegmentWalk<S, Rows>)];
  ExpertLoop<S, Rows> loop(params, shared, *reinterpret_cast<SegmentWalk<S, Rows>*>(walk));
  loop.run();
}

}  // namespace marlinq::cuda::sm80
