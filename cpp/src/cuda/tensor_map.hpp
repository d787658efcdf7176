// What the copy engine of compute capability 9.0 knows of a matrix.
#pragma once

#include <cstdint>

#include "cuda/problem.hpp"

namespace marlinq::cuda {

/// A CUtensorMap; made on the host, and passed to kernels as a __grid_constant__ parameter.
struct alignas(64) TensorMap {
  unsigned char opaque[128];
};

/// Boxes of 64 columns x `box_rows` rows of a row-major matrix of 2-byte elements. In shared memory a row
/// of a box is 128 bytes in pieces of 16; piece p of row r lies at p ^ (r % 8). The matrix begins at a
/// multiple of 16 bytes, and so do its rows. Throws device.
TensorMap tensor_map(const void* data, FloatType type, std::int64_t columns, std::int64_t rows,
                     std::int64_t row_stride, std::int32_t box_rows);

}  // namespace marlinq::cuda
