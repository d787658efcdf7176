// A block counts all ids by expert, so that it knows by itself where each expert begins and how many ids come
// before its own: blocks share the ids, and none waits for another. These kernels run once, and wait for
// their own instructions more than for anything else: loops are not unrolled, and what ids look like is
// decided on the host.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "core/integers.hpp"
#include "cuda/launch.hpp"
#include "cuda/moe/align.hpp"
#include "cuda/ptx/launch.cuh"
#include "marlinq/routing.hpp"

namespace marlinq::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kMostWarps = 32;
constexpr int kMostThreads = kMostWarps * kLanes;
constexpr unsigned kAllLanes = 0xFFFFFFFFU;
static_assert(kMostThreads >= kMaxExperts, "a thread for each expert");

// The ids of a block are contiguous runs, one a warp. Rows of counters: the ids before these, those of each
// run, and those after them.
constexpr int kRuns = 8;
constexpr int kRows = kRuns + 2;

// --- ids ---

/// Ids one after the other, from a multiple of 16 bytes on, a multiple of 4 of them.
template <class Id>
struct NeighbouringIds {
  const Id* data;

  __device__ __forceinline__ Id at(int32_t index) const { return data[index]; }
  __device__ __forceinline__ void four(int32_t index, int32_t /*count*/, Id (&ids)[4]) const {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(ids)) / 16; ++i) {
      reinterpret_cast<uint4*>(ids)[i] = reinterpret_cast<const uint4*>(data + index)[i];
    }
  }
};

struct AnyIds {
  TopkIds topk;

  __device__ __forceinline__ int64_t at(int32_t index) const {
    const uint32_t row = static_cast<uint32_t>(index) / static_cast<uint32_t>(topk.top_k);
    const uint32_t column = static_cast<uint32_t>(index) - row * topk.top_k;
    const int64_t place = row * topk.row_stride + column;
    return topk.wide ? static_cast<const int64_t*>(topk.data)[place]
                     : static_cast<const int32_t*>(topk.data)[place];
  }
  /// What lies behind the end is -1.
  __device__ __forceinline__ void four(int32_t index, int32_t count, int64_t (&ids)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) ids[i] = index + i < count ? at(index + i) : -1;
  }
};

/// The bucket of an id: its expert, or `num_experts` where it has none.
template <class Id>
__device__ __forceinline__ int32_t bucket_of(Id id, int32_t num_experts) {
  return static_cast<std::make_unsigned_t<Id>>(id) < static_cast<uint32_t>(num_experts)
             ? static_cast<int32_t>(id)
             : num_experts;
}

// --- sums over threads ---

__device__ __forceinline__ int32_t scan_warp(int32_t value, int lane) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

/// Sums of what comes before a thread in its block, and of all of it.
struct Scanned {
  int32_t before;
  int32_t all;
};

/// Sums over the warps of a block.
__device__ __forceinline__ Scanned scan_warps(const int32_t (&warp_sums)[kMostWarps]) {
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;
  const int32_t own = lane < blockDim.x / kLanes ? warp_sums[lane] : 0;
  const int32_t sums = scan_warp(own, lane);
  return {.before = __shfl_sync(kAllLanes, sums - own, warp),
          .all = __shfl_sync(kAllLanes, sums, kLanes - 1)};
}

/// By all threads of a block; holds one barrier.
__device__ __forceinline__ Scanned scan_block(int32_t value, int32_t (&warp_sums)[kMostWarps]) {
  const int lane = threadIdx.x % kLanes;
  const int32_t inclusive = scan_warp(value, lane);
  if (lane == kLanes - 1) warp_sums[threadIdx.x / kLanes] = inclusive;
  __syncthreads();
  const Scanned warps = scan_warps(warp_sums);
  return {.before = warps.before + inclusive - value, .all = warps.all};
}

/// f(owner, j) for every j from 0 to count - 1 of every lane `owner`: the lanes of a warp do it
/// together, and `prepare(owner)` is called by all of them before a lane's turn.
template <class Prepare, class F>
__device__ __forceinline__ void share_among_lanes(int32_t count, Prepare&& prepare, F&& f) {
  const int lane = threadIdx.x % kLanes;
  for (unsigned left = __ballot_sync(kAllLanes, count > 0); left != 0; left &= left - 1) {
    const int owner = __ffs(static_cast<int>(left)) - 1;
    const int32_t its_count = __shfl_sync(kAllLanes, count, owner);
    const auto of_owner = prepare(owner);
#pragma unroll 1
    for (int32_t j = lane; j < its_count; j += kLanes) f(of_owner, j);
  }
}

// --- the shares of the blocks ---

/// Block 0 has no ids, and makes lists. Bucket e is expert e; where ids without an expert count too, they
/// are the last.
struct Shares {
  std::int32_t ids = 0;
  std::int32_t experts = 0;
  std::int32_t buckets = 0;
  std::int32_t run_shift = 5;  // a run is 1 << run_shift ids, a multiple of 32
  std::int32_t blocks = 1;
  std::int32_t threads = 0;  // of a block

  std::int32_t shared_bytes() const { return kRows * buckets * 4; }
};

Shares make_shares(const TopkIds& topk_ids, std::int32_t num_experts, std::int32_t buckets) {
  constexpr std::int64_t kMostBlocks = 128;  // with ids
  Shares shares;
  shares.ids = topk_ids.tokens * topk_ids.top_k;
  shares.experts = num_experts;
  shares.buckets = buckets;
  while (ceil_div(shares.ids, std::int64_t{kRuns} << shares.run_shift) > kMostBlocks) {
    ++shares.run_shift;
  }
  shares.blocks +=
      static_cast<std::int32_t>(ceil_div(shares.ids, std::int64_t{kRuns} << shares.run_shift));
  const std::int64_t wanted = std::max<std::int64_t>(
      {num_experts, kRuns * kLanes, std::min<std::int64_t>(ceil_div(shares.ids, 4), kMostThreads)});
  shares.threads = static_cast<std::int32_t>(round_up(wanted, kLanes));
  return shares;
}

/// What a block knows of ids.
template <class Ids>
class Counts {
 public:
  __device__ __forceinline__ Counts(const Ids& ids, const Shares& shares, int32_t* counters)
      : ids_(ids), shares_(shares), counters_(counters) {
    begin_ = blockIdx.x == 0 ? shares.ids
                             : (static_cast<int32_t>(blockIdx.x) - 1) * kRuns << shares.run_shift;
    const int warp = threadIdx.x / kLanes;
    run_begin_ = warp < kRuns ? begin_ + (warp << shares.run_shift) : shares.ids;
    run_end_ = min(run_begin_ + (1 << shares.run_shift), shares.ids);
  }

  /// Counts all ids by bucket and row. Ends with a barrier.
  __device__ __forceinline__ void count() {
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < kRows * shares_.buckets; i += blockDim.x) counters_[i] = 0;
    ptx::wait_for_predecessor();
    first_bucket_ = bucket_at(run_begin_ + static_cast<int32_t>(threadIdx.x % kLanes));
    __syncthreads();
#pragma unroll 2
    for (int32_t index = static_cast<int32_t>(threadIdx.x) * 4; index < shares_.ids;
         index += static_cast<int32_t>(blockDim.x) * 4) {
      decltype(ids_.at(0)) four[4];
      ids_.four(index, shares_.ids, four);
      const int32_t from = index - begin_;
      const int32_t row = from < 0 ? 0 : min((from >> shares_.run_shift) + 1, kRows - 1);
      int32_t* const counters = counters_ + row * shares_.buckets;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t bucket = bucket_of(four[i], shares_.experts);
        if (bucket < shares_.buckets && index + i < shares_.ids) atomicAdd(counters + bucket, 1);
      }
    }
    __syncthreads();
  }

  /// Of a bucket.
  __device__ __forceinline__ int32_t sum(int32_t bucket) const {
    int32_t sum = 0;
#pragma unroll
    for (int row = 0; row < kRows; ++row) sum += counters_[row * shares_.buckets + bucket];
    return sum;
  }

  /// A bucket's counters become the places where each run's ids begin.
  __device__ __forceinline__ void begin_at(int32_t bucket, int32_t place) const {
    int32_t* const counters = counters_ + bucket;
#pragma unroll
    for (int row = 0; row <= kRuns; ++row) {
      const int32_t count = counters[row * shares_.buckets];
      counters[row * shares_.buckets] = place;
      place += count;
    }
  }

  /// Writes the ids of a warp's run to their places.
  __device__ __forceinline__ void place(int32_t* sorted) const {
    const int lane = threadIdx.x % kLanes;
    int32_t* const counters = counters_ + (threadIdx.x / kLanes + 1) * shares_.buckets;
    int32_t bucket = first_bucket_;
#pragma unroll 1
    for (int32_t first = run_begin_; first < run_end_; first += kLanes) {
      if (first > run_begin_) bucket = bucket_at(first + lane);
      const unsigned peers = same_bucket(bucket);
      const int rank = __popc(peers & ((1U << lane) - 1));
      const bool counts = bucket < shares_.buckets;
      const int32_t place = counts ? counters[bucket] + rank : 0;
      __syncwarp();
      if (counts && rank == 0) counters[bucket] = place + __popc(peers);
      __syncwarp();
      if (counts) sorted[place] = first + lane;
    }
  }

 private:
  /// Past the end of the run: none.
  __device__ __forceinline__ int32_t bucket_at(int32_t index) const {
    return index < run_end_ ? bucket_of(ids_.at(index), shares_.experts) : shares_.buckets;
  }

  /// The lanes that have the same bucket: a ballot a bit takes a fraction of the time of
  /// __match_any_sync.
  __device__ __forceinline__ unsigned same_bucket(int32_t bucket) const {
    unsigned peers = kAllLanes;
#pragma unroll 2
    for (int32_t bit = 1; bit <= shares_.buckets; bit *= 2) {
      const bool set = (bucket & bit) != 0;
      const unsigned others = __ballot_sync(kAllLanes, set);
      peers &= set ? others : ~others;
    }
    return peers;
  }

  const Ids& ids_;
  const Shares& shares_;
  int32_t* counters_;  // [kRows][buckets] in shared memory
  int32_t begin_;      // of the ids of the block
  int32_t run_begin_, run_end_;
  int32_t first_bucket_;  // of this lane's first id of the run
};

// --- the tiles of a block ---

constexpr int kClasses = 8;

/// Of what is left of an expert, by falling rows; but see ExpertTiles.
__device__ __forceinline__ int32_t rest_class(int32_t rest, int32_t max_rows) {
  if (max_rows <= kMixedRows) return 0;
  return kClasses - 1 - (rest - 1) * kClasses / max_rows;
}

/// By a block: the tiles of experts, a thread each, that have `count` ids from `start` on.
__device__ __forceinline__ void list_tiles(int32_t start, int32_t count, int32_t max_rows,
                                           const ExpertTiles& tiles) {
  // Full tiles; then the tiles of each class of rows that are left, two classes a word.
  constexpr int kWords = 1 + kClasses / 2;
  __shared__ int32_t warp_sums[kWords][kMostWarps];
  const int lane = threadIdx.x % kLanes;
  const auto expert = static_cast<int32_t>(threadIdx.x);
  const int32_t full = count / max_rows;
  const int32_t rest = count - full * max_rows;
  const int32_t of_class = rest_class(rest, max_rows);
  const int32_t own_word = rest > 0 ? 1 + of_class / 2 : kWords;
  const int32_t shift = 16 * (of_class % 2);
  int32_t full_before = 0;
  int32_t rest_before = 0;
#pragma unroll 1
  for (int word = 0; word < kWords; ++word) {
    const int32_t value = word == 0 ? full : word == own_word ? 1 << shift : 0;
    const int32_t inclusive = scan_warp(value, lane);
    if (lane == kLanes - 1) warp_sums[word][threadIdx.x / kLanes] = inclusive;
    if (word == 0) full_before = inclusive - value;
    if (word == own_word) rest_before = (inclusive - value) >> shift & 0xffff;
  }
  __syncthreads();
  int32_t all_tiles = 0;
#pragma unroll 1
  for (int word = 0; word < kWords; ++word) {
    const Scanned scanned = scan_warps(warp_sums[word]);
    if (word == 0) {
      full_before += scanned.before;
      all_tiles = scanned.all;
      continue;
    }
    const int32_t even = scanned.all & 0xffff;
    if (word == own_word) {
      rest_before += all_tiles + (scanned.before >> shift & 0xffff) + (shift > 0 ? even : 0);
    }
    all_tiles += even + (scanned.all >> 16);
  }
  if (expert == 0) *tiles.count = all_tiles;
  const auto write_tile = [&](int32_t tile, int32_t first, int32_t rows) {
    tiles.experts[tile] = expert;
    tiles.first[tile] = first;
    tiles.rows[tile] = rows;
  };
  if (rest > 0) write_tile(rest_before, start + full * max_rows, rest);
#pragma unroll 1
  for (int32_t i = 0; i < full; ++i) {
    write_tile(full_before + i, start + i * max_rows, max_rows);
  }
}

template <class Ids>
__global__ void __launch_bounds__(kMostThreads, 1)
    sort_kernel(const Ids ids, const Shares shares, int32_t max_rows, const ExpertTiles tiles) {
  extern __shared__ int32_t counters[];
  __shared__ int32_t warp_sums[kMostWarps];
  ptx::launch_dependents();
  Counts<Ids> counts(ids, shares, counters);
  counts.count();
  const auto expert = static_cast<int32_t>(threadIdx.x);
  const int32_t count = expert < shares.experts ? counts.sum(expert) : 0;
  const int32_t start = scan_block(count, warp_sums).before;
  if (blockIdx.x == 0) {
    list_tiles(start, count, max_rows, tiles);
    return;
  }
  if (expert < shares.experts) counts.begin_at(expert, start);
  __syncthreads();
  counts.place(tiles.ids);
}

// --- the lists of moe_align_block_size ---

struct DeviceNames {
  const int32_t* data;  // null: each expert's own number
  __device__ __forceinline__ int32_t of(int32_t expert) const {
    return data == nullptr ? expert : data[expert];
  }
};

struct HostNames {
  int32_t values[kMaxExperts];
  __device__ __forceinline__ int32_t of(int32_t expert) const { return values[expert]; }
};

template <class Ids, class Names>
__global__ void __launch_bounds__(kMostThreads, 1)
    align_kernel(const Ids ids, const Shares shares, int32_t block_size, const AlignedTiles tiles,
                 const __grid_constant__ Names names) {
  extern __shared__ int32_t counters[];
  __shared__ int32_t warp_sums[kMostWarps];
  ptx::launch_dependents();
  Counts<Ids> counts(ids, shares, counters);
  counts.count();
  const auto expert = static_cast<int32_t>(threadIdx.x);
  const auto tiles_for = [&](int32_t count) { return (count + block_size - 1) / block_size; };
  const int32_t count = expert < shares.experts ? counts.sum(expert) : 0;
  const int32_t own_tiles = tiles_for(count);
  const Scanned scanned = scan_block(own_tiles, warp_sums);
  const int32_t start = scanned.before * block_size;
  const int32_t absent_start = scanned.all * block_size;
  if (blockIdx.x > 0) {
    if (expert < shares.experts) counts.begin_at(expert, start);
    if (expert == 0) counts.begin_at(shares.experts, absent_start);
    __syncthreads();
    counts.place(tiles.sorted_token_ids);
    return;
  }
  const int32_t absent = counts.sum(shares.experts);
  const int32_t all = scanned.all + tiles_for(absent);
  if (expert == 0) *tiles.num_tokens_past_padded = all * block_size;
  const int32_t name = expert < shares.experts ? names.of(expert) : -1;
  share_among_lanes(
      own_tiles,
      [&](int owner) {
        return int2{__shfl_sync(kAllLanes, name, owner),
                    __shfl_sync(kAllLanes, scanned.before, owner)};
      },
      [&](const int2& of, int32_t j) { tiles.expert_ids[of.y + j] = of.x; });
#pragma unroll 1
  for (int64_t i = scanned.all + expert; i < tiles.expert_size; i += blockDim.x) {
    tiles.expert_ids[i] = -1;
  }
  // Padding is all that is no place of an id.
  share_among_lanes(
      own_tiles * block_size - count,
      [&](int owner) { return __shfl_sync(kAllLanes, start + count, owner); },
      [&](int32_t end, int32_t j) { tiles.sorted_token_ids[end + j] = shares.ids; });
#pragma unroll 1
  for (int64_t i = absent_start + absent + expert; i < tiles.sorted_size; i += blockDim.x) {
    tiles.sorted_token_ids[i] = shares.ids;
  }
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), const Shares& shares, bool dependent, void* stream,
            const std::type_identity_t<Parameters>&... parameters) {
  launch_kernel(kernel, dim3(static_cast<unsigned>(shares.blocks)), shares.threads,
                shares.shared_bytes(), dependent, static_cast<cudaStream_t>(stream), parameters...);
}

/// f(ids) with what describes them best.
template <class F>
void with_ids(const TopkIds& topk_ids, F&& f) {
  const bool neighbours = topk_ids.row_stride == topk_ids.top_k &&
                          topk_ids.tokens * topk_ids.top_k % 4 == 0 &&
                          reinterpret_cast<std::uintptr_t>(topk_ids.data) % 16 == 0;
  if (!neighbours) {
    f(AnyIds{topk_ids});
  } else if (topk_ids.wide) {
    f(NeighbouringIds<std::int64_t>{static_cast<const std::int64_t*>(topk_ids.data)});
  } else {
    f(NeighbouringIds<std::int32_t>{static_cast<const std::int32_t*>(topk_ids.data)});
  }
}

}  // namespace

void sort_by_expert(const TopkIds& topk_ids, std::int32_t num_experts, std::int32_t max_rows,
                    const ExpertTiles& tiles, bool dependent_launch, void* stream) {
  const Shares shares = make_shares(topk_ids, num_experts, num_experts);
  with_ids(topk_ids, [&](auto ids) {
    launch(sort_kernel<decltype(ids)>, shares, dependent_launch, stream, ids, shares, max_rows,
           tiles);
  });
}

void align_block_size(const TopkIds& topk_ids, std::int32_t block_size, std::int32_t num_experts,
                      const ExpertMap& expert_map, const AlignedTiles& tiles, bool dependent_launch,
                      void* stream) {
  const Shares shares = make_shares(topk_ids, num_experts, num_experts + 1);
  with_ids(topk_ids, [&](auto ids) {
    const auto run = [&](const auto& names) {
      launch(align_kernel<decltype(ids), std::decay_t<decltype(names)>>, shares, dependent_launch,
             stream, ids, shares, block_size, tiles, names);
    };
    if (expert_map.data != nullptr && expert_map.on_host) {
      HostNames names{};
      std::copy_n(expert_map.data, num_experts, names.values);
      run(names);
    } else {
      run(DeviceNames{expert_map.data});
    }
  });
}

}  // namespace marlinq::cuda
