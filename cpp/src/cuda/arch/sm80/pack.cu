#include <cuda_runtime.h>

#include "cuda/arch/sm80/pack.hpp"
#include "cuda/cuda_check.hpp"

namespace marlinq::cuda::sm80 {
namespace {

constexpr int kGroupThreads = 256;

// A block of threads a tile. Rows of the raw tensor are read in runs of 256 bytes, gathered ones as
// often as a word has codes (from L2, which holds a piece), and a tile is written as one run of 2 or
// 4 KB. What it costs is instructions, about 30 a code: a 4096 x 4096 layer is some 15 us of an H200,
// a tenth of what the bus takes to bring it.
template <int kBits>
__global__ void __launch_bounds__(CodeTile::kThreads) pack_codes(const PieceToPack piece) {
  __shared__ uint8_t tile[CodeTile::kBytes];
  const CodeTile where(piece, blockIdx.x);
  const int thread = threadIdx.x;
  where.read<kBits>(piece, thread, tile);
  __syncthreads();
  constexpr int kCodeBits = kBits == 8 ? 8 : 4;
  for (int half = 0; half < kCodeBits / 4; ++half) {
    uint32_t words[CodeTile::kWords];
    where.gather<kCodeBits>(thread, half, tile, words);
    auto* target = reinterpret_cast<uint4*>(piece.codes + where.place(piece, thread, half));
    uint4 value = make_uint4(words[0], words[1], words[2], words[3]);
    if (!where.whole) {  // another piece has, or will have, features here
      const uint4 there = *target;
      value.x |= there.x;
      value.y |= there.y;
      value.z |= there.z;
      value.w |= there.w;
    }
    *target = value;
  }
}

__global__ void pack_groups(const PieceToPack piece) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kGroupThreads) + threadIdx.x;
  if (index < piece.num_groups * piece.columns) pack_scale(piece, index);
}

}  // namespace

void pack_piece(const PieceToPack& piece, void* stream_pointer) {
  auto* stream = static_cast<cudaStream_t>(stream_pointer);
  const auto pack = piece.bits == 8   ? pack_codes<8>
                    : piece.bits == 4 ? pack_codes<4>
                    : piece.bits == 3 ? pack_codes<3>
                                      : pack_codes<2>;
  pack<<<static_cast<unsigned>(piece.tiles()), CodeTile::kThreads, 0, stream>>>(piece);
  MARLINQ_CUDA_CHECK(cudaGetLastError());
  const auto blocks =
      static_cast<unsigned>(ceil_div(piece.columns * piece.num_groups, kGroupThreads));
  pack_groups<<<blocks, kGroupThreads, 0, stream>>>(piece);
  MARLINQ_CUDA_CHECK(cudaGetLastError());
}

}  // namespace marlinq::cuda::sm80
