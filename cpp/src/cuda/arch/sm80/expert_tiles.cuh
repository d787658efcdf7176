// What the kernels over experts multiply: token tiles, each with the weight of its own expert.
#pragma once

#include <climits>
#include <cstdint>

#include "cuda/arch/sm80/experts.hpp"
#include "cuda/arch/sm80/group_values.cuh"
#include "cuda/arch/sm80/share.hpp"
#include "cuda/problem.hpp"
#include "cuda/ptx/copy.cuh"

namespace marlinq::cuda::sm80 {

/// Where the rows of an id are. `x` negative: there is no such row.
struct RowPlace {
  int x = -1;
  int y = -1;
  int64_t weight = 0;  // place among the weights
};

/// Rows that meet one expert.
struct TokenTile {
  int expert;
  int rows;   // at most, negative too
  int first;  // slot or row of x, ...
  int y;      // ... and row of y, of the first of them
};

/// The lists of token tiles in shared memory, where they are short.
struct NearTiles {
  static constexpr int kMost = 512;

  alignas(16) int32_t experts[kMost];
  int32_t first[kMost];
  int32_t rows[kMost];
  int32_t ids[kMostSortedIds];  // of slots, where the block sorts them
};

/// Where the rows of an id lie.
struct SlotPlaces {
  Divider top_k;
  int64_t weights_stride;
  bool x_by_slot;
  bool y_by_slot;

  __device__ __forceinline__ RowPlace place(int slot, int id) const {
    const int token = top_k.divide(id);
    return {.x = x_by_slot ? slot : token,
            .y = y_by_slot ? slot : id,
            .weight = token * weights_stride + (id - token * top_k.divisor)};
  }
};

/// Token tiles from lists on the device.
struct ListedTiles {
  /// The lists with an element a tile; they may be copies in shared memory.
  struct Entries {
    const int32_t* experts;
    const int32_t* first;  // null where rows is
    const int32_t* rows;
    int tiles;  // how many there are, where that was asked for
  };

  TokenTileLists lists;
  Divider tile_rows;
  Divider pieces;  // tiles of the kernel that one of the lists is cut into
  SlotPlaces slots;

  /// Brings what a block is likely to read first nearer, all at once: it looks up one after the other.
  __device__ __forceinline__ void prefetch(int block, const Divider& feature_tiles) const {
    const int thread = threadIdx.x;
    const int likely = pieces.divide(feature_tiles.divide(block)) + thread - 64;
    const int tile = thread < 64 ? thread : likely;
    if (tile < 0 || tile >= lists.most_tiles) return;
    ptx::prefetch(lists.experts + tile);
    if (lists.first != nullptr) ptx::prefetch(lists.first + tile);
    if (lists.rows != nullptr) ptx::prefetch(lists.rows + tile);
    ptx::prefetch(lists.ids + min(int64_t{tile} * tile_rows.divisor, lists.most_slots - 1));
  }

  __device__ __forceinline__ int count() const {
    const int used = max(*lists.used, 0);
    const int tiles = lists.first != nullptr ? used : tile_rows.divide(used);
    return min(tiles, lists.most_tiles) * pieces.divisor;
  }
  __device__ __forceinline__ Entries entries() const {
    return {lists.experts, lists.first, lists.rows, 0};
  }
  /// Copies them into `near`, where they fit; by all threads of a block, which meet at its end.
  __device__ __forceinline__ Entries bring_near(NearTiles& near, int threads) const {
    Entries result = entries();
    result.tiles = count();
    if (lists.most_tiles <= NearTiles::kMost) {
      for (int i = threadIdx.x; i < lists.most_tiles; i += threads) {
        near.experts[i] = lists.experts[i];
        if (lists.first != nullptr) {
          near.first[i] = lists.first[i];
          near.rows[i] = lists.rows[i];
        }
      }
      result.experts = near.experts;
      if (lists.first != nullptr) {
        result.first = near.first;
        result.rows = near.rows;
      }
    }
    __syncthreads();
    return result;
  }
  __device__ __forceinline__ int expert(int tile) const {
    return lists.experts[pieces.divide(tile)];
  }
  __device__ __forceinline__ TokenTile tile(const Entries& of, int tile, int tokens) const {
    const int listed = pieces.divide(tile);
    const int before = (tile - listed * pieces.divisor) * tokens;
    const bool whole = of.first == nullptr;
    return {.expert = of.experts[listed],
            .rows = (whole ? tile_rows.divisor : of.rows[listed]) - before,
            .first = (whole ? listed * tile_rows.divisor : of.first[listed]) + before,
            .y = 0};
  }
  /// The id of row `at` of a tile.
  __device__ __forceinline__ int id(const Entries& /*of*/, const TokenTile& tile, int at) const {
    return at < tile.rows ? lists.ids[tile.first + at] : -1;
  }
  /// Where the row of that id is.
  __device__ __forceinline__ RowPlace place(const TokenTile& tile, int at, int id) const {
    if (id < 0 || id >= lists.num_ids) return {};
    return slots.place(tile.first + at, id);
  }
  __device__ __forceinline__ RowPlace row(const Entries& of, const TokenTile& tile, int at) const {
    return place(tile, at, id(of, tile, at));
  }
};

/// Token tiles that a block makes by itself: it sorts the ids by expert, an id a thread.
struct SortedTiles {
  struct Entries {
    const NearTiles* near;
    int tiles;
  };

  TopkIds topk;
  int num_experts;
  SlotPlaces slots;

  /// By all `threads` of a block, of which none has two ids; they meet at its end.
  __device__ __forceinline__ Entries bring_near(NearTiles& near, int threads) const {
    static_assert(NearTiles::kMost >= kMostSortedIds);
    constexpr int kNone = INT_MAX;  // sorts behind all experts
    const int ids = topk.tokens * topk.top_k;
    const int thread = threadIdx.x;
    int expert = kNone;
    if (thread < ids) {
      const int token = thread / topk.top_k;
      const int64_t place = token * topk.row_stride + (thread - token * topk.top_k);
      const int64_t id = topk.wide ? static_cast<const int64_t*>(topk.data)[place]
                                   : static_cast<const int32_t*>(topk.data)[place];
      if (id >= 0 && id < num_experts) expert = static_cast<int>(id);
    }
    near.experts[thread] = expert;
    __syncthreads();
    int before = 0;  // ids that come before this one, ...
    int same = 0;    // ... those of its expert among them, ...
    int all = 0;     // ... and all of its expert
    for (int i = 0; i < ids; i += 4) {
      const int4 four = *reinterpret_cast<const int4*>(near.experts + i);
      const int others[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool equal = others[j] == expert;
        const bool earlier = equal && i + j < thread;
        all += equal;
        same += earlier;
        before += earlier || others[j] < expert;
      }
    }
    const bool first = expert != kNone && same % kRows == 0;
    if (thread < ids) {
      near.ids[before] = thread;
      // What begins at this place, for the thread of the place to read.
      near.rows[before] = first ? min(all - same, kRows) : 0;
    }
    __syncthreads();
    const int rows = thread < ids ? near.rows[thread] : 0;
    const int begins_with = rows > 0 ? near.experts[near.ids[thread]] : 0;
    const uint32_t begins = __ballot_sync(0xffffffffu, rows > 0);
    if (thread % 32 == 0) near.first[thread / 32] = __popc(begins);
    __syncthreads();
    int tile = __popc(begins & ((1u << thread % 32) - 1));
    int tiles = 0;
    for (int warp = 0; warp < threads / 32; ++warp) {
      const int of_warp = near.first[warp];
      if (warp < thread / 32) tile += of_warp;
      tiles += of_warp;
    }
    __syncthreads();
    if (rows > 0) {
      near.experts[tile] = begins_with;
      near.first[tile] = thread;
      near.rows[tile] = rows;
    }
    __syncthreads();
    return {&near, tiles};
  }
  __device__ __forceinline__ TokenTile tile(const Entries& of, int tile, int /*tokens*/) const {
    return {.expert = of.near->experts[tile],
            .rows = of.near->rows[tile],
            .first = of.near->first[tile],
            .y = 0};
  }
  __device__ __forceinline__ int id(const Entries& of, const TokenTile& tile, int at) const {
    return at < tile.rows ? of.near->ids[tile.first + at] : -1;
  }
  __device__ __forceinline__ RowPlace place(const TokenTile& tile, int at, int id) const {
    if (id < 0) return {};
    return slots.place(tile.first + at, id);
  }
  __device__ __forceinline__ RowPlace row(const Entries& of, const TokenTile& tile, int at) const {
    return place(tile, at, id(of, tile, at));
  }

 private:
  static constexpr int kRows = 8;
};

/// Token tiles of consecutive rows, in the parameters of the kernel.
struct DispatchedTiles {
  struct Entries {
    int tiles;
  };

  int num_dispatches;
  int tiles;
  bool x_by_slot;  // rows of x come in the order of the tiles, whole tiles each
  ExpertRows rows[kMostDispatches];
  int first_tile[kMostDispatches];

  __device__ __forceinline__ void prefetch(int /*block*/, const Divider& /*feature_tiles*/) const {}
  __device__ __forceinline__ int count() const { return tiles; }
  __device__ __forceinline__ Entries entries() const { return {tiles}; }
  __device__ __forceinline__ Entries bring_near(NearTiles& /*near*/, int /*threads*/) const {
    return entries();
  }
  __device__ __forceinline__ int expert(int tile) const { return rows[find(tile)].expert; }
  __device__ __forceinline__ TokenTile tile(const Entries& /*of*/, int tile, int tokens) const {
    const int dispatch = find(tile);
    const int before = (tile - first_tile[dispatch]) * tokens;
    return {.expert = rows[dispatch].expert,
            .rows = rows[dispatch].rows - before,
            .first = x_by_slot ? tile * tokens : rows[dispatch].input_row + before,
            .y = rows[dispatch].output_row + before};
  }
  __device__ __forceinline__ int id(const Entries& /*of*/, const TokenTile& tile, int at) const {
    return at < tile.rows ? at : -1;
  }
  __device__ __forceinline__ RowPlace place(const TokenTile& tile, int at, int id) const {
    if (id < 0) return {};
    return {.x = tile.first + at, .y = tile.y + at};
  }
  __device__ __forceinline__ RowPlace row(const Entries& of, const TokenTile& tile, int at) const {
    return place(tile, at, id(of, tile, at));
  }

 private:
  __device__ __forceinline__ int find(int tile) const {
    int low = 0, high = num_dispatches;  // first_tile[low] <= tile < first_tile[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_tile[middle] <= tile) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

/// What a tile takes, in microseconds on an H200; a block compares these.
struct ExpertCost {
  static constexpr int kTogether = 4;
  float step[kTogether];  // a chunk, with so many blocks on a multiprocessor
  float cut;              // handing over the parts of a tile, ...
  float part;             // ... for each part, ...
  float uneven;           // ... and where runs cross from a tile into the next
};

template <class Rows_>
struct ExpertParams {
  using Rows = Rows_;

  GemmProblem problem;  // of expert 0
  SplitScratch scratch;
  Rows rows;
  int64_t expert_bytes;
  int num_experts;
  Divider chunks;
  Divider feature_tiles;
  Divider blocks;
  ExpertCost cost;
  int multiprocessors;
  int slice_bytes;
  const float* weights;
  bool weights_bias;
  bool activates;
  Activation activation;
  bool may_cut;
  int share;     // as ExpertPlan's
  bool settled;  // the rows of the tiles are known before the kernel before has ended
  bool pairs;    // outputs are of type T, and may be stored two at a time
};

/// As load_chunk_groups, of an expert.
template <class Rows>
__device__ __forceinline__ ChunkGroups expert_chunk_groups(const ExpertParams<Rows>& params,
                                                           int expert, int chunk) {
  const WeightView& w = params.problem.weight;
  if (w.chunk_shift >= 0) return {(chunk >> w.chunk_shift) << 4};
  return {__ldg(w.chunk_groups + expert * (params.expert_bytes / 4) + chunk)};
}

}  // namespace marlinq::cuda::sm80
