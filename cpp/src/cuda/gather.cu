#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "core/integers.hpp"
#include "cuda/gather.hpp"
#include "cuda/launch.hpp"
#include "cuda/ptx/launch.cuh"
#include "cuda/shared_memory.hpp"

namespace marlinq::cuda {
namespace {

constexpr int kColumns = 8;  // of a thread: one 16-byte store
constexpr int kDirectThreads = 256;
constexpr int kStagedThreads = 512;

struct Rows {
  const void* x;
  int64_t x_stride;
  int32_t m;
  int32_t k;
  const int32_t* source;
  void* out;
  int32_t columns;
};

// The 16 bits of a value as the kernels read it.
__device__ __forceinline__ uint32_t bits_of(float value) {
  return __half_as_ushort(__float2half_rn(value));
}
__device__ __forceinline__ uint32_t bits_of(__half value) { return __half_as_ushort(value); }
__device__ __forceinline__ uint32_t bits_of(__nv_bfloat16 value) {
  return __bfloat16_as_ushort(value);
}

// Elements of a row from where they stand; -1: 0.
template <class In>
__device__ __forceinline__ uint4 pick(const In* x, const int32_t (&from)[kColumns]) {
  uint32_t words[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns; i += 2) {
    const uint32_t low = from[i] < 0 ? 0 : bits_of(x[from[i]]);
    const uint32_t high = from[i + 1] < 0 ? 0 : bits_of(x[from[i + 1]]);
    words[i / 2] = low | high << 16;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Straight from memory, an element at a time: for few rows, and for columns that stay in order.
template <class In>
__global__ void gather_directly(const Rows rows) {
  // The product may start now, and ask for its weights.
  ptx::launch_dependents();
  const int64_t row = blockIdx.y;
  const int32_t first = (blockIdx.x * kDirectThreads + threadIdx.x) * kColumns;
  int32_t from[kColumns];
  if (first < rows.columns) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      from[i] =
          rows.source != nullptr ? rows.source[first + i] : (first + i < rows.k ? first + i : -1);
    }
  }
  // All of the kernel before: this one writes what a product before may still read.
  ptx::wait_for_predecessor();
  if (first >= rows.columns) return;
  const In* x = static_cast<const In*>(rows.x) + row * rows.x_stride;
  auto* out = static_cast<uint16_t*>(rows.out) + row * rows.columns + first;
  *reinterpret_cast<uint4*>(out) = pick(x, from);
}

// Two rows come whole into shared memory, a word of both for each column, so that what is read in
// any order is never a sector of 32 bytes for the sake of 2, and each place is looked up once for
// both. A block writes a segment of the columns.
template <class In>
__global__ void __launch_bounds__(kStagedThreads)
    gather_staged(const Rows rows, int32_t segment_columns) {
  extern __shared__ uint32_t pairs[];  // [k]
  ptx::launch_dependents();
  const int64_t row = int64_t{blockIdx.y} * 2;
  const bool both = row + 1 < rows.m;
  const In* const upper = static_cast<const In*>(rows.x) + row * rows.x_stride;
  const In* const lower = both ? upper + rows.x_stride : upper;
  ptx::wait_for_predecessor();
  constexpr int kVector = 16 / sizeof(In);
  const bool vectors =
      (reinterpret_cast<uintptr_t>(upper) | reinterpret_cast<uintptr_t>(lower)) % 16 == 0;
  const int32_t in_vectors = vectors ? rows.k / kVector * kVector : 0;
#pragma unroll 2
  for (int32_t at = threadIdx.x * kVector; at < in_vectors; at += kStagedThreads * kVector) {
    __align__(16) In a[kVector];
    __align__(16) In b[kVector];
    *reinterpret_cast<uint4*>(a) = *reinterpret_cast<const uint4*>(upper + at);
    *reinterpret_cast<uint4*>(b) = *reinterpret_cast<const uint4*>(lower + at);
#pragma unroll
    for (int i = 0; i < kVector; i += 4) {
      *reinterpret_cast<uint4*>(pairs + at + i) = make_uint4(
          bits_of(a[i]) | bits_of(b[i]) << 16, bits_of(a[i + 1]) | bits_of(b[i + 1]) << 16,
          bits_of(a[i + 2]) | bits_of(b[i + 2]) << 16, bits_of(a[i + 3]) | bits_of(b[i + 3]) << 16);
    }
  }
  for (int32_t at = in_vectors + threadIdx.x; at < rows.k; at += kStagedThreads) {
    pairs[at] = bits_of(upper[at]) | bits_of(lower[at]) << 16;
  }
  __syncthreads();
  const int32_t begin = blockIdx.x * segment_columns;
  const int32_t end = min(begin + segment_columns, rows.columns);
  auto* const out = static_cast<uint16_t*>(rows.out) + row * rows.columns;
#pragma unroll 2
  for (int32_t at = begin + threadIdx.x * kColumns; at < end; at += kStagedThreads * kColumns) {
    __align__(16) int32_t from[kColumns];
    *reinterpret_cast<int4*>(from) = *reinterpret_cast<const int4*>(rows.source + at);
    *reinterpret_cast<int4*>(from + 4) = *reinterpret_cast<const int4*>(rows.source + at + 4);
    uint32_t pair[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) pair[i] = from[i] < 0 ? 0 : pairs[from[i]];
    uint32_t first[kColumns / 2];
    uint32_t second[kColumns / 2];
#pragma unroll
    for (int i = 0; i < kColumns; i += 2) {
      first[i / 2] = __byte_perm(pair[i], pair[i + 1], 0x5410);
      second[i / 2] = __byte_perm(pair[i], pair[i + 1], 0x7632);
    }
    *reinterpret_cast<uint4*>(out + at) = make_uint4(first[0], first[1], first[2], first[3]);
    if (both) {
      *reinterpret_cast<uint4*>(out + rows.columns + at) =
          make_uint4(second[0], second[1], second[2], second[3]);
    }
  }
}

// A block writes a run of columns of all rows of a tile.
template <class In>
__global__ void __launch_bounds__(kDirectThreads) gather_tiles(const ExpertGather gather) {
  ptx::launch_dependents();
  ptx::wait_for_predecessor();
  const TokenTileLists& lists = gather.tiles;
  const int32_t tile = blockIdx.x;
  const int32_t used = *lists.used;
  if (tile >= (lists.first != nullptr ? used : used / lists.tile_rows)) return;
  const int32_t expert = lists.experts[tile];
  if (expert < 0 || expert >= gather.num_experts) return;
  const int32_t first = (blockIdx.y * kDirectThreads + threadIdx.x) * kColumns;
  if (first >= gather.columns) return;
  const int32_t* source = gather.source + expert * (gather.expert_bytes / 4) + first;
  int32_t from[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) from[i] = source[i];
  const int32_t slot = lists.first != nullptr ? lists.first[tile] : tile * lists.tile_rows;
  const int32_t rows = lists.rows != nullptr ? lists.rows[tile] : lists.tile_rows;
#pragma unroll 2
  for (int32_t row = slot; row < slot + rows; ++row) {
    const int32_t id = lists.ids[row];
    if (id < 0 || id >= lists.num_ids) continue;
    const int64_t input = gather.x_by_slot ? row : id / gather.top_k;
    const In* x = static_cast<const In*>(gather.x) + input * gather.x_stride;
    auto* out =
        static_cast<uint16_t*>(gather.out) + static_cast<int64_t>(row) * gather.columns + first;
    *reinterpret_cast<uint4*>(out) = pick(x, from);
  }
}

template <class In>
void gather(const Rows& rows, const DeviceLimits& limits, bool dependent, cudaStream_t stream) {
  // Up to this many rows there is less to read than a staged row takes to come.
  constexpr std::int32_t kFewRows = 2;
  const std::int64_t shared_bytes = std::int64_t{rows.k} * 4;
  if (rows.source == nullptr || rows.m <= kFewRows || shared_bytes > limits.shared_bytes) {
    const auto blocks = ceil_div(rows.columns, kDirectThreads * kColumns);
    launch_kernel(gather_directly<In>, dim3(static_cast<unsigned>(blocks), rows.m), kDirectThreads,
                  0, dependent, stream, rows);
    return;
  }
  const auto pairs = static_cast<std::int32_t>(ceil_div(rows.m, 2));
  // Segments enough for every multiprocessor, but none of less than a round of the threads.
  const auto most = static_cast<std::int32_t>(ceil_div(rows.columns, kStagedThreads * kColumns));
  const std::int32_t segments = std::clamp(limits.multiprocessors / pairs, 1, most);
  const auto segment_columns =
      static_cast<std::int32_t>(round_up(ceil_div(rows.columns, segments), kColumns));
  static std::atomic<std::uint64_t> devices_done{0};
  allow_shared_memory(gather_staged<In>, devices_done);
  launch_kernel(gather_staged<In>, dim3(static_cast<unsigned>(segments), pairs), kStagedThreads,
                shared_bytes, dependent, stream, rows, segment_columns);
}

}  // namespace

void gather_rows(const void* x, FloatType x_type, std::int64_t x_stride, std::int32_t m,
                 std::int32_t k, const std::int32_t* source, void* out, FloatType out_type,
                 std::int32_t columns, const DeviceLimits& limits, bool dependent_launch,
                 void* stream) {
  constexpr std::int32_t kMostRows = 65534;  // of a grid's second dimension, and even
  const auto size = x_type == FloatType::kF32 ? 4 : 2;
  for (std::int32_t first = 0; first < m; first += kMostRows) {
    const Rows rows{
        .x = static_cast<const unsigned char*>(x) + first * x_stride * size,
        .x_stride = x_stride,
        .m = std::min(kMostRows, m - first),
        .k = k,
        .source = source,
        .out = static_cast<unsigned char*>(out) + static_cast<std::int64_t>(first) * columns * 2,
        .columns = columns};
    auto* s = static_cast<cudaStream_t>(stream);
    if (x_type == FloatType::kF32) {
      gather<float>(rows, limits, dependent_launch, s);
    } else if (out_type == FloatType::kBF16) {
      gather<__nv_bfloat16>(rows, limits, dependent_launch, s);
    } else {
      gather<__half>(rows, limits, dependent_launch, s);
    }
  }
}

void gather_expert_rows(const ExpertGather& gather, bool dependent_launch, void* stream) {
  const auto kernel = gather.x_type == FloatType::kF32    ? gather_tiles<float>
                      : gather.x_type == FloatType::kBF16 ? gather_tiles<__nv_bfloat16>
                                                          : gather_tiles<__half>;
  const auto segments = ceil_div(gather.columns, kDirectThreads * kColumns);
  launch_kernel(
      kernel, dim3(static_cast<unsigned>(gather.tiles.most_tiles), static_cast<unsigned>(segments)),
      kDirectThreads, 0, dependent_launch, static_cast<cudaStream_t>(stream), gather);
}

}  // namespace marlinq::cuda
