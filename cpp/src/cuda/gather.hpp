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

}  // namespace marlinq::cuda
