// Packing on the host: runs what the threads of the packing kernels do, block by block.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda/arch/sm80/pack_piece.hpp"

namespace marlinq::test {

/// As cuda::sm80::pack_piece() for a piece in host memory. Where two blocks or threads write one
/// word, or one reads what no one wrote, a sanitizer or the result tells.
inline void pack_piece_on_host(const cuda::sm80::PieceToPack& piece) {
  using cuda::sm80::CodeTile;
  const auto store = [&piece](const CodeTile& tile, int thread, int half,
                              const std::uint32_t (&words)[CodeTile::kWords]) {
    std::uint32_t* target = piece.codes + tile.place(piece, thread, half);
    for (int i = 0; i < CodeTile::kWords; ++i) {
      target[i] = tile.whole ? words[i] : target[i] | words[i];
    }
  };
  for (std::int64_t index = 0; index < piece.tiles(); ++index) {
    const CodeTile tile(piece, index);
    std::vector<std::uint8_t> shared(CodeTile::kBytes);
    for (int thread = 0; thread < CodeTile::kThreads; ++thread) {
      switch (piece.bits) {
        case 2:
          tile.read<2>(piece, thread, shared.data());
          break;
        case 3:
          tile.read<3>(piece, thread, shared.data());
          break;
        case 4:
          tile.read<4>(piece, thread, shared.data());
          break;
        default:
          tile.read<8>(piece, thread, shared.data());
      }
    }
    for (int thread = 0; thread < CodeTile::kThreads; ++thread) {
      for (int half = 0; half < piece.layout.pieces(); ++half) {
        std::uint32_t words[CodeTile::kWords];
        if (piece.bits == 8) {
          tile.gather<8>(thread, half, shared.data(), words);
        } else {
          tile.gather<4>(thread, half, shared.data(), words);
        }
        store(tile, thread, half, words);
      }
    }
  }
  for (std::int64_t index = 0; index < piece.num_groups * piece.columns; ++index) {
    pack_scale(piece, index);
  }
}

/// As cuda::sm80::convert_scales() for weights in host memory.
inline void convert_scales_on_host(const cuda::sm80::ScalesToConvert& scales) {
  for (std::int64_t index = 0; index < scales.pieces(); ++index) {
    std::uint16_t halves[8];
    std::memcpy(halves, scales.piece(index), sizeof halves);
    for (std::uint16_t& bits : halves) bits = cuda::sm80::bfloat16_as_half(bits);
    std::memcpy(scales.piece(index), halves, sizeof halves);
  }
}

}  // namespace marlinq::test
