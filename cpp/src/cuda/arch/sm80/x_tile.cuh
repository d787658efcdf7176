// A tile of x in shared memory: a row of 64 columns is 128 bytes, in pieces of 16. Piece p of row r
// lies at p ^ (r % 8), so that the 8 rows of an ldmatrix meet all 32 banks.
#pragma once

#include <cstdint>

#include "cuda/problem.hpp"

namespace marlinq::cuda::sm80 {

constexpr int kXRowBytes = 128;

__device__ __forceinline__ uint32_t x_piece_place(int row, int piece) {
  return row * kXRowBytes + ((piece ^ (row % 8)) * 16);
}

/// Bytes of the piece from `column` on that x has; the rest is 0.
__device__ __forceinline__ int x_piece_bytes(const GemmProblem& p, int column) {
  return min(16, max(0, 2 * (p.x_columns - column)));
}

}  // namespace marlinq::cuda::sm80
