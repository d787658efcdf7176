#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "core/integers.hpp"
#include "cuda/cuda_check.hpp"
#include "cuda/fetch.hpp"

namespace marlinq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnit = kFetchUnit;
constexpr int kUnitsOfThread = 4;  // on their way together
constexpr int kUnitsOfBlock = kThreads * kUnitsOfThread;

struct Rows {
  const unsigned char* from;
  uint4* to;
  std::int64_t pitch;
  std::uint32_t units;  // of all rows
  std::uint32_t units_of_row;
  std::uint32_t last_bytes;  // of the last unit
  std::uint32_t end_block;
};

constexpr int kMost = 64;
struct Batch {
  Rows rows[kMost];
};
static_assert(sizeof(Batch) <= 4096, "more than the parameters of a kernel may be");

// 16 bytes from any address, by whole aligned units: of which each holds a byte that is wanted, so
// that none lies outside of the pages of the tensor.
__device__ uint4 load(const unsigned char* from, bool reaches_next) {
  const auto address = reinterpret_cast<std::uintptr_t>(from);
  const auto* units = reinterpret_cast<const uint4*>(address & ~std::uintptr_t{kUnit - 1});
  const auto shift = static_cast<std::uint32_t>(address % kUnit);
  const uint4 low = units[0];
  if (shift == 0) return low;
  const uint4 high = reaches_next ? units[1] : make_uint4(0, 0, 0, 0);
  std::uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = shift & 8 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = shift & 4 ? w[i + 1] : w[i];
  const std::uint32_t bits = shift % 4 * 8;
  return make_uint4(__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits),
                    __funnelshift_r(w[2], w[3], bits), __funnelshift_r(w[3], w[4], bits));
}

__global__ void __launch_bounds__(kThreads) fetch(const __grid_constant__ Batch batch) {
  int which = 0;
  while (blockIdx.x >= batch.rows[which].end_block) ++which;
  const Rows& rows = batch.rows[which];
  const std::uint32_t first_block = which == 0 ? 0 : batch.rows[which - 1].end_block;
  const std::uint32_t first = (blockIdx.x - first_block) * kUnitsOfBlock + threadIdx.x;
  uint4 values[kUnitsOfThread];
#pragma unroll
  for (int i = 0; i < kUnitsOfThread; ++i) {
    const std::uint32_t unit = first + i * kThreads;
    if (unit >= rows.units) continue;
    const std::uint32_t row = rows.units_of_row == rows.units ? 0 : unit / rows.units_of_row;
    const std::uint32_t in_row = unit - row * rows.units_of_row;
    const unsigned char* from = rows.from + row * rows.pitch + std::int64_t{in_row} * kUnit;
    const std::uint32_t bytes = unit + 1 == rows.units ? rows.last_bytes : kUnit;
    const auto shift = static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(from) % kUnit);
    values[i] = load(from, shift + bytes > kUnit);
  }
#pragma unroll
  for (int i = 0; i < kUnitsOfThread; ++i) {
    const std::uint32_t unit = first + i * kThreads;
    if (unit < rows.units) rows.to[unit] = values[i];
  }
}

}  // namespace

void fetch_rows(std::span<const FetchRows> all, cudaStream_t stream) {
  while (!all.empty()) {
    const std::size_t count = std::min<std::size_t>(all.size(), kMost);
    Batch batch{};
    std::int64_t blocks = 0;
    for (std::size_t i = 0; i < count; ++i) {
      const FetchRows& r = all[i];
      const std::int64_t of_row = ceil_div(r.row_bytes, kUnit);
      blocks += ceil_div(of_row * r.rows, kUnitsOfBlock);
      batch.rows[i] = {.from = r.from,
                       .to = reinterpret_cast<uint4*>(r.to),
                       .pitch = r.pitch,
                       .units = static_cast<std::uint32_t>(of_row * r.rows),
                       .units_of_row = static_cast<std::uint32_t>(of_row),
                       .last_bytes = static_cast<std::uint32_t>(r.row_bytes - (of_row - 1) * kUnit),
                       .end_block = static_cast<std::uint32_t>(blocks)};
    }
    fetch<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(batch);
    MARLINQ_CUDA_CHECK(cudaGetLastError());
    all = all.subspan(count);
  }
}

}  // namespace marlinq::cuda
