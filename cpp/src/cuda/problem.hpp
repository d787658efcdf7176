// What crosses from the host to a kernel of the CUDA backend: plain structs, no CUDA header.
#pragma once

#include <cstdint>

namespace marlinq::cuda {

enum class FloatType : std::uint8_t { kF32, kF16, kBF16 };

/// One packed weight on a device, as kernels see it.
struct WeightView {
  const std::uint32_t* codes = nullptr;
  const void* scales = nullptr;
  const std::uint8_t* zeros = nullptr;
  const float* bias = nullptr;               // null: none
  const std::int32_t* step_group = nullptr;  // group of each 16 packed rows
  const std::int32_t* source =
      nullptr;  // input row of each packed row, -1 padding; null: the same row
  FloatType scale_type = FloatType::kF16;
  std::int32_t code_bits = 4;
  std::int32_t n = 0;
  std::int32_t k = 0;
  std::int32_t packed_rows = 0;
  std::int32_t groups = 0;
};

/// y = x W^T + bias for rows of x that a kernel can read 16 bytes at a time.
struct GemmProblem {
  WeightView weight;
  const void* x = nullptr;
  FloatType x_type = FloatType::kF16;  // kF16 or kBF16
  std::int64_t x_stride = 0;           // elements
  std::int32_t x_columns = 0;          // readable; packed rows beyond meet 0
  void* y = nullptr;
  FloatType y_type = FloatType::kF16;
  std::int64_t y_stride = 0;
  std::int32_t m = 0;
};

/// Memory that split products share; kernels leave the counters at 0.
struct SplitScratch {
  float* partials = nullptr;
  std::int64_t partial_floats = 0;
  std::uint32_t* counters = nullptr;
  std::int32_t num_counters = 0;
};

struct DeviceLimits {
  std::int32_t multiprocessors = 0;
  std::int32_t shared_bytes = 0;  // of a block, at most
  std::int32_t capability = 0;    // 10 * major + minor
};

enum class KernelKind : std::uint8_t {
  kStrip,  // few tokens: whole strips a block, K over its warps
  kTile,   // tiles of tokens x features, K perhaps split over blocks
};

/// How a problem is run; the pure result of plan().
struct GemmPlan {
  KernelKind kind = KernelKind::kTile;
  std::int32_t token_tile = 8;
  std::int32_t feature_tile = 64;
  std::int32_t splits = 1;  // kTile
  std::int32_t blocks = 1;  // kStrip
  std::int32_t shared_bytes = 0;
  /// The kernel may start before the one before it has ended, and waits for it by itself.
  bool dependent_launch = false;
};

}  // namespace marlinq::cuda
