// Packing for the sm_80 kernels on the device, in the order of layout.hpp.
#pragma once

#include <cstdint>

#include "cuda/arch/sm80/pack_plan.hpp"

namespace marlinq::cuda::sm80 {

/// The raw tensors of a module, on the device.
struct RawModule {
  const std::uint32_t* qweight = nullptr;
  const std::uint32_t* qzeros = nullptr;  // null: every zero point is 2^(b-1)
  const void* scales = nullptr;
  std::int32_t bits = 4;
  std::int32_t add_one = 0;  // v1: zero points are stored minus 1
  std::int64_t n = 0;
  std::int64_t first_feature = 0;  // of the segment
};

/// The tables of a segment, on the device.
struct PackTables {
  const std::int32_t* source = nullptr;
  const std::int32_t* step_group = nullptr;
  const std::int32_t* raw_group = nullptr;
};

/// Packs one module of a segment. `codes` and `groups` are the segment's own, zeroed before its
/// first module. Sets *scales_spread to 1 where quotients of scales might overflow.
/// Asynchronous. Throws device.
void pack_module(const RawModule& raw, const SegmentPlan& plan, const PackTables& tables,
                 std::uint32_t* codes, unsigned char* groups, std::int32_t* scales_spread,
                 void* stream);

}  // namespace marlinq::cuda::sm80
