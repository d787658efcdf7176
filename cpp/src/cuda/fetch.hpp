// Many small tensors from pinned host memory to the device at once, by a kernel that reads them there:
// each copy of the runtime costs the bus some 3 us of its own.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

namespace marlinq::cuda {

constexpr std::int64_t kFetchUnit = 16;  // bytes

/// Rows of a host tensor, which follow one another on the device.
struct FetchRows {
  const unsigned char* from = nullptr;  // as the device sees it; any alignment
  unsigned char* to = nullptr;          // at 16 bytes; the bytes up to the next 16 are written too
  std::int64_t rows = 0;
  std::int64_t row_bytes = 0;  // a multiple of 16 where there are several rows
  std::int64_t pitch = 0;      // from row to row of the host's
};

/// Asynchronous. Throws device.
void fetch_rows(std::span<const FetchRows> all, cudaStream_t stream);

}  // namespace marlinq::cuda
