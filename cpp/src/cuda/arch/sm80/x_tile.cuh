// A tile of x in shared memory: a row of 64 columns is 128 bytes, in pieces of 16. Piece p of row r
// lies at p ^ (r % 8), so that the 8 rows of an ldmatrix meet all 32 banks.
#pragma once

#include <cstdint>

#include "cuda/problem.hpp"
#include "cuda/ptx/copy.cuh"

namespace marlinq::cuda::sm80 {

constexpr int kXRowBytes = 128;

__device__ __forceinline__ uint32_t x_piece_place(int row, int piece) {
  return row * kXRowBytes + ((piece ^ (row % 8)) * 16);
}

/// Zeros where x has no columns: in its last chunk, when it does not fill it. Columns come in pieces
/// of 8.
__device__ __forceinline__ void clear_missing_columns(uint32_t tile, int chunk,
                                                      const GemmProblem& p, int rows, int thread,
                                                      int threads) {
  const int present = (p.x_columns - chunk * 64) / 8;
  if (present >= 8) return;
  const int first = max(present, 0);
#pragma unroll 1
  for (int i = thread; i < rows * 8; i += threads) {
    if (i % 8 >= first) {
      ptx::store_shared_16(tile + x_piece_place(i / 8, i % 8), make_uint4(0, 0, 0, 0));
    }
  }
}

}  // namespace marlinq::cuda::sm80
