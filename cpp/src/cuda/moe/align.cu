#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "core/integers.hpp"
#include "cuda/launch.hpp"
#include "cuda/moe/align.hpp"
#include "cuda/ptx/launch.cuh"
#include "cuda/shared_memory.hpp"
#include "marlinq/routing.hpp"

namespace marlinq::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kMostWarps = 32;
constexpr int kMostThreads = kMostWarps * kLanes;
constexpr unsigned kAllLanes = 0xFFFFFFFFU;
static_assert(kMostThreads >= kMaxExperts, "a thread for each expert");

// The counters of all runs: 64 KB, which fits beside the rest into the 99 KB that every GPU has.
constexpr int kMostCounters = 32 * 513;

/// The ids are cut into `runs` contiguous runs, one a warp, whose counters of each bucket lie in
/// shared memory. Bucket e is expert e; where ids without an expert count too, they are the last.
struct Runs {
  std::int32_t ids = 0;
  std::int32_t runs = 0;
  std::int32_t length = 0;  // of a run, a multiple of 32
  std::int32_t buckets = 0;
  std::int32_t threads = 0;
  std::int32_t shared_bytes = 0;
  bool staged = false;  // ids are put into their order in shared memory, in 16 bits each
};

Runs make_runs(const TopkIds& topk_ids, std::int32_t num_experts, std::int32_t buckets) {
  Runs runs;
  runs.ids = topk_ids.tokens * topk_ids.top_k;
  runs.buckets = buckets;
  const auto steps = static_cast<std::int32_t>(ceil_div(runs.ids, kLanes));
  const std::int32_t most = std::min({kMostWarps, kMostCounters / buckets, steps});
  if (most > 0) {
    const std::int64_t steps_each = ceil_div(steps, most);
    runs.length = static_cast<std::int32_t>(steps_each * kLanes);
    runs.runs = static_cast<std::int32_t>(ceil_div(steps, steps_each));
  }
  const auto for_experts = static_cast<std::int32_t>(round_up(num_experts, kLanes));
  runs.threads = std::max(for_experts, runs.runs * kLanes);
  runs.shared_bytes = (runs.runs + 1) * buckets * 4;
  return runs;
}

/// The bucket of a flat id; `num_experts` where it has no expert.
__device__ __forceinline__ int32_t bucket_of(const TopkIds& topk_ids, int32_t index,
                                             int32_t num_experts) {
  int64_t place = index;
  if (topk_ids.row_stride != topk_ids.top_k) {
    const uint32_t row = static_cast<uint32_t>(index) / static_cast<uint32_t>(topk_ids.top_k);
    const uint32_t column = static_cast<uint32_t>(index) - row * topk_ids.top_k;
    place = row * topk_ids.row_stride + column;
  }
  const int64_t id = topk_ids.wide ? static_cast<const int64_t*>(topk_ids.data)[place]
                                   : static_cast<const int32_t*>(topk_ids.data)[place];
  return id >= 0 && id < num_experts ? static_cast<int32_t>(id) : num_experts;
}

/// Sums of what comes before a thread in its block, and of all of it.
struct Scanned {
  int32_t before;
  int32_t all;
};

__device__ __forceinline__ int32_t scan_warp(int32_t value, int lane) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

/// Sums over the block of kCount values a thread. By all threads; holds one block barrier.
template <int kCount>
__device__ __forceinline__ void scan_block(const int32_t (&values)[kCount],
                                           Scanned (&scanned)[kCount],
                                           int32_t (&warp_sums)[kCount][kMostWarps]) {
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;
  const int warps = blockDim.x / kLanes;
  int32_t inclusive[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    inclusive[i] = scan_warp(values[i], lane);
    if (lane == kLanes - 1) warp_sums[i][warp] = inclusive[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int32_t sums = scan_warp(lane < warps ? warp_sums[i][lane] : 0, lane);
    const int32_t warps_before = __shfl_sync(kAllLanes, sums, max(warp - 1, 0));
    scanned[i].before = inclusive[i] - values[i] + (warp > 0 ? warps_before : 0);
    scanned[i].all = __shfl_sync(kAllLanes, sums, kLanes - 1);
  }
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
    for (int32_t j = lane; j < its_count; j += kLanes) f(of_owner, j);
  }
}

/// What a warp knows of its run.
struct Run {
  int32_t begin;
  int32_t end;
  int32_t* counters;     // [buckets]
  int32_t first_bucket;  // of this lane's first id, which for few ids is the only one
};

/// Counts the ids of each bucket in each run. By all threads; ends with a block barrier.
__device__ __forceinline__ Run count_runs(const TopkIds& topk_ids, const Runs& runs,
                                          int32_t num_experts, int32_t* counters) {
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;
  for (int32_t i = threadIdx.x; i < runs.runs * runs.buckets; i += blockDim.x) counters[i] = 0;
  ptx::wait_for_predecessor();
  Run run{.begin = runs.ids,
          .end = runs.ids,
          .counters = counters + warp * runs.buckets,
          .first_bucket = runs.buckets};
  if (warp < runs.runs) {
    run.begin = min(warp * runs.length, runs.ids);
    run.end = min(run.begin + runs.length, runs.ids);
    if (run.begin + lane < run.end) {
      run.first_bucket = bucket_of(topk_ids, run.begin + lane, num_experts);
    }
  }
  __syncthreads();
  if (run.first_bucket < runs.buckets) atomicAdd(run.counters + run.first_bucket, 1);
#pragma unroll 4
  for (int32_t i = run.begin + kLanes + lane; i < run.end; i += kLanes) {
    const int32_t bucket = bucket_of(topk_ids, i, num_experts);
    if (bucket < runs.buckets) atomicAdd(run.counters + bucket, 1);
  }
  __syncthreads();
  return run;
}

/// Makes a bucket's counters the sums over the runs before each. Returns the sum over all.
__device__ __forceinline__ int32_t sum_runs(const Runs& runs, int32_t bucket, int32_t* counters) {
  constexpr int kAtOnce = 8;
  int32_t sum = 0;
  for (int32_t first = 0; first < runs.runs; first += kAtOnce) {
    int32_t counts[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      counts[i] = first + i < runs.runs ? counters[(first + i) * runs.buckets + bucket] : 0;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i < runs.runs) counters[(first + i) * runs.buckets + bucket] = sum;
      sum += counts[i];
    }
  }
  return sum;
}

/// The lanes that have the same bucket, of `buckets` at most: a ballot a bit takes a fraction of the time of
/// __match_any_sync.
__device__ __forceinline__ unsigned same_bucket(int32_t bucket, int32_t buckets) {
  unsigned peers = kAllLanes;
#pragma unroll 2
  for (int32_t bit = 1; bit <= buckets; bit *= 2) {
    const bool set = (bucket & bit) != 0;
    const unsigned others = __ballot_sync(kAllLanes, set);
    peers &= set ? others : ~others;
  }
  return peers;
}

/// Writes the ids of a warp's run to their places. `starts` says where each bucket begins.
template <class Id>
__device__ __forceinline__ void place_ids(const TopkIds& topk_ids, const Runs& runs, const Run& run,
                                          int32_t num_experts, const int32_t* starts, Id* sorted) {
  const int lane = threadIdx.x % kLanes;
  for (int32_t first = run.begin; first < run.end; first += kLanes) {
    const int32_t index = first + lane;
    int32_t bucket = run.first_bucket;
    if (first > run.begin) {
      bucket = index < run.end ? bucket_of(topk_ids, index, num_experts) : runs.buckets;
    }
    const unsigned peers = same_bucket(bucket, runs.buckets);
    const int rank = __popc(peers & ((1U << lane) - 1));
    const bool counts = bucket < runs.buckets;
    const int32_t place = counts ? starts[bucket] + run.counters[bucket] + rank : 0;
    __syncwarp();
    if (counts && rank == 0) run.counters[bucket] += __popc(peers);
    __syncwarp();
    if (counts) sorted[place] = static_cast<Id>(index);
  }
}

constexpr int kRestWords = 4;

/// Of what is left of an expert, by falling rows.
__device__ __forceinline__ int32_t rest_class(int32_t rest, int32_t max_rows) {
  constexpr int kClasses = 2 * kRestWords;
  return kClasses - 1 - (rest - 1) * kClasses / max_rows;
}

__global__ void __launch_bounds__(kMostThreads, 1)
    sort_kernel(const TopkIds topk_ids, const Runs runs, int32_t max_rows,
                const ExpertTiles tiles) {
  extern __shared__ int32_t shared[];
  __shared__ int32_t warp_sums[2 + kRestWords][kMostWarps];
  int32_t* const counters = shared;                           // [runs][buckets]
  int32_t* const starts = shared + runs.runs * runs.buckets;  // [buckets]
  ptx::launch_dependents();
  const Run run = count_runs(topk_ids, runs, runs.buckets, counters);
  const auto expert = static_cast<int32_t>(threadIdx.x);
  const int32_t count = expert < runs.buckets ? sum_runs(runs, expert, counters) : 0;
  const int32_t full = count / max_rows;
  const int32_t rest = count - full * max_rows;
  // How many tiles of each class of rows are left, two classes a word.
  const int32_t of_class = 1 << (16 * (rest_class(rest, max_rows) % 2));
  int32_t values[2 + kRestWords] = {count, full};
#pragma unroll
  for (int i = 0; i < kRestWords; ++i) {
    values[2 + i] = rest > 0 && rest_class(rest, max_rows) / 2 == i ? of_class : 0;
  }
  Scanned scanned[2 + kRestWords];
  scan_block(values, scanned, warp_sums);
  const int32_t start = scanned[0].before;
  const int32_t full_before = scanned[1].before;
  int32_t rest_tile = scanned[1].all;
  int32_t all_tiles = scanned[1].all;
#pragma unroll
  for (int i = 0; i < 2 * kRestWords; ++i) {
    const int shift = 16 * (i % 2);
    const int32_t all = scanned[2 + i / 2].all >> shift & 0xffff;
    const int32_t before = scanned[2 + i / 2].before >> shift & 0xffff;
    all_tiles += all;
    if (i < rest_class(rest, max_rows)) rest_tile += all;
    if (i == rest_class(rest, max_rows)) rest_tile += before;
  }
  if (expert < runs.buckets) starts[expert] = start;
  if (expert == 0) *tiles.count = all_tiles;
  const auto write_tile = [&](int32_t tile, int32_t of_expert, int32_t first, int32_t rows) {
    tiles.experts[tile] = of_expert;
    tiles.first[tile] = first;
    tiles.rows[tile] = rows;
  };
  if (rest > 0) write_tile(rest_tile, expert, start + full * max_rows, rest);
  share_among_lanes(
      full,
      [&](int owner) {
        return int3{__shfl_sync(kAllLanes, expert, owner),
                    __shfl_sync(kAllLanes, full_before, owner),
                    __shfl_sync(kAllLanes, start, owner)};
      },
      [&](const int3& of, int32_t j) {
        write_tile(of.y + j, of.x, of.z + j * max_rows, max_rows);
      });
  __syncthreads();
  if (!runs.staged) {
    place_ids(topk_ids, runs, run, runs.buckets, starts, tiles.ids);
    return;
  }
  auto* const sorted = reinterpret_cast<uint16_t*>(starts + runs.buckets);
  place_ids(topk_ids, runs, run, runs.buckets, starts, sorted);
  __syncthreads();
  for (int32_t i = expert; i < scanned[0].all; i += blockDim.x) tiles.ids[i] = sorted[i];
}

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

template <class Names>
__global__ void __launch_bounds__(kMostThreads, 1)
    align_kernel(const TopkIds topk_ids, const Runs runs, int32_t block_size,
                 const AlignedTiles tiles, const __grid_constant__ Names names) {
  extern __shared__ int32_t shared[];
  __shared__ int32_t warp_sums[1][kMostWarps];
  __shared__ int32_t absent_tiles;
  int32_t* const counters = shared;                           // [runs][buckets]
  int32_t* const starts = shared + runs.runs * runs.buckets;  // [buckets]
  const int32_t num_experts = runs.buckets - 1;
  ptx::launch_dependents();
  const Run run = count_runs(topk_ids, runs, num_experts, counters);
  for (int64_t i = threadIdx.x; i < tiles.sorted_size; i += blockDim.x) {
    tiles.sorted_token_ids[i] = runs.ids;
  }
  const auto expert = static_cast<int32_t>(threadIdx.x);
  const auto tiles_of = [&](int32_t bucket) {
    return (sum_runs(runs, bucket, counters) + block_size - 1) / block_size;
  };
  const int32_t values[1] = {expert < num_experts ? tiles_of(expert) : 0};
  if (expert == 0) absent_tiles = tiles_of(num_experts);
  Scanned scanned[1];
  scan_block(values, scanned, warp_sums);
  const int32_t first_tile = scanned[0].before;
  const int32_t with_expert = scanned[0].all;
  const int32_t all = with_expert + absent_tiles;
  if (expert < num_experts) starts[expert] = first_tile * block_size;
  if (expert == 0) {
    starts[num_experts] = with_expert * block_size;
    *tiles.num_tokens_past_padded = all * block_size;
  }
  const int32_t name = expert < num_experts ? names.of(expert) : -1;
  share_among_lanes(
      values[0],
      [&](int owner) {
        return int2{__shfl_sync(kAllLanes, name, owner), __shfl_sync(kAllLanes, first_tile, owner)};
      },
      [&](const int2& of, int32_t j) { tiles.expert_ids[of.y + j] = of.x; });
  for (int64_t i = with_expert + expert; i < tiles.expert_size; i += blockDim.x) {
    tiles.expert_ids[i] = -1;
  }
  // Also orders the padding before the ids that take its place.
  __syncthreads();
  place_ids(topk_ids, runs, run, num_experts, starts, tiles.sorted_token_ids);
}

/// A warp that writes ids to their places writes to as many lines; so they are written one after the other
/// where they fit into the shared memory that every GPU has.
void stage_ids(Runs& runs) {
  constexpr std::int32_t kLeastIds = 1024;
  constexpr std::int32_t kMostIds = 1 << 16;
  constexpr std::int32_t kMostBytes = 98 * 1024;  // beside some static memory
  const std::int64_t bytes = runs.shared_bytes + std::int64_t{runs.ids} * 2;
  if (runs.ids < kLeastIds || runs.ids > kMostIds || bytes > kMostBytes) return;
  runs.staged = true;
  runs.shared_bytes = static_cast<std::int32_t>(bytes);
}

template <class... Parameters>
void launch_block(void (*kernel)(Parameters...), std::atomic<std::uint64_t>& devices_done,
                  const Runs& runs, bool dependent, void* stream,
                  const std::type_identity_t<Parameters>&... parameters) {
  allow_shared_memory(kernel, devices_done);
  launch_kernel(kernel, dim3(1), runs.threads, runs.shared_bytes, dependent,
                static_cast<cudaStream_t>(stream), parameters...);
}

}  // namespace

void sort_by_expert(const TopkIds& topk_ids, std::int32_t num_experts, std::int32_t max_rows,
                    const ExpertTiles& tiles, bool dependent_launch, void* stream) {
  static std::atomic<std::uint64_t> devices_done{0};
  Runs runs = make_runs(topk_ids, num_experts, num_experts);
  stage_ids(runs);
  launch_block(sort_kernel, devices_done, runs, dependent_launch, stream, topk_ids, runs, max_rows,
               tiles);
}

void align_block_size(const TopkIds& topk_ids, std::int32_t block_size, std::int32_t num_experts,
                      const ExpertMap& expert_map, const AlignedTiles& tiles, bool dependent_launch,
                      void* stream) {
  const Runs runs = make_runs(topk_ids, num_experts, num_experts + 1);
  if (expert_map.data != nullptr && expert_map.on_host) {
    static std::atomic<std::uint64_t> devices_done{0};
    HostNames names{};
    std::copy_n(expert_map.data, num_experts, names.values);
    launch_block(align_kernel<HostNames>, devices_done, runs, dependent_launch, stream, topk_ids,
                 runs, block_size, tiles, names);
    return;
  }
  static std::atomic<std::uint64_t> devices_done{0};
  launch_block(align_kernel<DeviceNames>, devices_done, runs, dependent_launch, stream, topk_ids,
               runs, block_size, tiles, DeviceNames{expert_map.data});
}

}  // namespace marlinq::cuda
