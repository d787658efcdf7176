// Puts rows of x into the packed row order, padded, in the type that the kernels read.
#pragma once

#include <cstdint>

#include "cuda/problem.hpp"

namespace marlinq::cuda {

/// out[row][i] = x[row][source[i]], 0 where source is -1; source null: the same column, 0 from k
/// on. `dependent_launch` as in GemmPlan.
void gather_rows(const void* x, FloatType x_type, std::int64_t x_stride, std::int32_t m,
                 std::int32_t k, const std::int32_t* source, void* out, FloatType out_type,
                 std::int32_t columns, const DeviceLimits& limits, bool dependent_launch,
                 void* stream);

struct ExpertGather {
  const void* x = nullptr;
  FloatType x_type = FloatType::kF16;
  std::int64_t x_stride = 0;
  TokenTileLists tiles = {};
  std::int32_t top_k = 1;
  bool x_by_slot = false;
  const std::int32_t* source = nullptr;  // of expert 0
  std::int64_t expert_bytes = 0;
  std::int32_t num_experts = 0;
  void* out = nullptr;  // [slots, columns]
  std::int32_t columns = 0;
};

/// The row of x of every slot in the packed row order of its expert; float32 becomes float16.
void gather_expert_rows(const ExpertGather& gather, bool dependent_launch, void* stream);

}  // namespace marlinq::cuda
