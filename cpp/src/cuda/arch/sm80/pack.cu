#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "core/integers.hpp"
#include "cuda/arch/sm80/pack.hpp"
#include "cuda/cuda_check.hpp"

namespace marlinq::cuda::sm80 {
namespace {

constexpr std::size_t kMostPieces = 16;
struct PieceBatch {
  PieceToPack pieces[kMostPieces];
};
static_assert(sizeof(PieceBatch) <= 4096, "more than the parameters of a kernel may be");

// blockIdx.y is the piece. A block of threads takes a tile of its codes, or, beyond the last one, a
// scale and zero point for each thread. Rows of the raw tensor are read in runs of 256 bytes, gathered
// ones as often as a word has codes (from L2, which holds a piece), and a tile is written as one run of
// 2 or 4 KB. What it costs is instructions, about 30 a code: a 4096 x 4096 layer is some 15 us of an
// H200, a tenth of what the bus takes to bring it.
template <int kBits>
__global__ void __launch_bounds__(CodeTile::kThreads)
    pack(const __grid_constant__ PieceBatch batch) {
  __shared__ uint8_t tile[CodeTile::kBytes];
  const PieceToPack& piece = batch.pieces[blockIdx.y];
  const int thread = threadIdx.x;
  const int64_t tiles = piece.tiles();
  if (blockIdx.x >= tiles) {
    const int64_t index = (blockIdx.x - tiles) * CodeTile::kThreads + thread;
    if (index < piece.num_groups * piece.columns) pack_scale(piece, index);
    return;
  }
  const CodeTile where(piece, blockIdx.x);
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

constexpr int kConvertThreads = 256;

__global__ void __launch_bounds__(kConvertThreads)
    convert(const __grid_constant__ ScalesToConvert scales) {
  const int64_t index = int64_t{blockIdx.x} * kConvertThreads + threadIdx.x;
  if (index >= scales.pieces()) return;
  auto* const piece = reinterpret_cast<uint4*>(scales.piece(index));
  uint4 value = *piece;
  for (uint32_t* word : {&value.x, &value.y, &value.z, &value.w}) {
    const uint32_t low = bfloat16_as_half(static_cast<uint16_t>(*word));
    const uint32_t high = bfloat16_as_half(static_cast<uint16_t>(*word >> 16));
    *word = low | high << 16;
  }
  *piece = value;
}

}  // namespace

void convert_scales(const ScalesToConvert& scales, void* stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(scales.pieces(), kConvertThreads));
  convert<<<blocks, kConvertThreads, 0, static_cast<cudaStream_t>(stream)>>>(scales);
  MARLINQ_CUDA_CHECK(cudaGetLastError());
}

void pack_pieces(std::span<const PieceToPack> pieces, void* stream) {
  while (!pieces.empty()) {
    PieceBatch batch;
    std::size_t count = 0;
    std::int64_t blocks = 0;
    while (count < std::min(pieces.size(), kMostPieces)) {
      const PieceToPack& piece = pieces[count];
      const auto meets = [&piece](const PieceToPack& other) { return piece.shares_tiles(other); };
      if (std::any_of(batch.pieces, batch.pieces + count, meets)) break;
      blocks = std::max(
          blocks, piece.tiles() + ceil_div(piece.columns * piece.num_groups, CodeTile::kThreads));
      batch.pieces[count++] = piece;
    }
    const int bits = pieces.front().bits;
    const auto kernel = bits == 8 ? pack<8> : bits == 4 ? pack<4> : bits == 3 ? pack<3> : pack<2>;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(count));
    kernel<<<grid, CodeTile::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(batch);
    MARLINQ_CUDA_CHECK(cudaGetLastError());
    pieces = pieces.subspan(count);
  }
}

}  // namespace marlinq::cuda::sm80
