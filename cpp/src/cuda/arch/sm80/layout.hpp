// The packed order of the sm_80 kernels: weights are operand A of mma.m16n8k16.
//
// A strip is 16 output features, a block 4 strips; N is padded to whole blocks. K is in packed row
// order (core/row_order.hpp), every group padded to a multiple of 16 rows (a step, one mma) and the
// whole to chunks of 64. Lane = 4 g + t of a warp (g 0..7, t 0..3).
//
//   codes   [block][chunk][strip in block][piece][lane][4 words]
//     4 bits (also 2 and 3), one piece: word j serves the 16 rows of step j.
//       nibble i of a word, bits 4i..4i+3:
//         0, 4: feature g,     rows 2t, 2t+1        2, 6: feature g,     rows 2t+8, 2t+9
//         1, 5: feature g + 8, rows 2t, 2t+1        3, 7: feature g + 8, rows 2t+8, 2t+9
//       so nibbles r and r + 4 are the two halves of the fragment's register r. Even ones hold the
//       code q; odd ones q - 7.5 = +-(t + 1/2), t in their lower three bits and the sign, set for -, 8 bits
//       above the highest (around the end of the word). So the signs of 1 and 5 are those of their halves,
//       and after a rotation by 8 bits nibbles 2, 3, 6, 7 with signs stand where 0, 1, 4, 5 were.
//     8 bits, two pieces of 32 rows: words 2j, 2j+1 of a piece serve the 16 rows of its step j.
//       word 2j + h: bytes 0, 1: feature g, rows 2t+8h, 2t+8h+1; bytes 2, 3: the same rows of
//       feature g + 8.
//   groups  [block][group][4 strips] records: 16 scales in the checkpoint's dtype (bfloat16 ones
//     that float16 can hold are that in the end), then 16 zero
//     points of a byte unless all of the layer are the middle of the codes. Inside both the order
//     is g, g + 8 for g = 0..7. Groups without rows are left out.
//   chunk_groups  [chunk] words: the group of the chunk's first step from bit 4 on; bit s (1..3) is
//     set where step s starts the next group.
//   bias    [feature] float32
//
// A lane's 16 bytes are read by that lane alone, a block is one stream along K, and a chunk of it
// one piece of 2 KB (4 bits). Padding: codes are the zero point (their product is 0). Padded
// features have scale and zero point 0. A scale of 0 becomes 1 and its codes the zero point, so
// that kernels may divide by scales.
#pragma once

#include <cstdint>

#include "core/integers.hpp"

namespace marlinq::cuda::sm80 {

struct Layout {
  static constexpr int kStripFeatures = 16;
  static constexpr int kBlockStrips = 4;
  static constexpr int kBlockFeatures = kBlockStrips * kStripFeatures;
  static constexpr int kGroupAlignment = 16;  // rows of a step
  static constexpr int kChunkRows = 64;
  static constexpr int kChunkSteps = kChunkRows / kGroupAlignment;
  static constexpr int kLanes = 32;
  static constexpr int kLaneWords = 4;  // 16 bytes

  int code_bits = 4;
  int scale_bytes = 2;
  bool has_zeros = false;
  std::int64_t n = 0;
  std::int64_t chunks = 0;
  std::int64_t groups = 0;  // that have rows

  friend constexpr bool operator==(const Layout&, const Layout&) = default;

  constexpr std::int64_t strips() const noexcept { return ceil_div(n, kStripFeatures); }
  constexpr std::int64_t blocks() const noexcept { return ceil_div(strips(), kBlockStrips); }
  constexpr int pieces() const noexcept { return code_bits / 4; }

  /// Index of a 32-bit word of the codes.
  constexpr std::int64_t word(std::int64_t strip, std::int64_t chunk, int piece, int lane,
                              int word_in_lane) const noexcept {
    const std::int64_t block_chunk = strip / kBlockStrips * chunks + chunk;
    return (((block_chunk * kBlockStrips + strip % kBlockStrips) * pieces() + piece) * kLanes +
            lane) *
               kLaneWords +
           word_in_lane;
  }
  constexpr std::int64_t words() const noexcept {
    return blocks() * chunks * kBlockStrips * pieces() * kLanes * kLaneWords;
  }

  /// Bytes of the record of one strip and group.
  constexpr int record_bytes() const noexcept {
    return kStripFeatures * (scale_bytes + (has_zeros ? 1 : 0));
  }
  constexpr std::int64_t record(std::int64_t strip, std::int64_t group) const noexcept {
    return ((strip / kBlockStrips * groups + group) * kBlockStrips + strip % kBlockStrips) *
           record_bytes();
  }
  /// Byte of a feature's scale inside the record of its strip.
  constexpr int scale_place(int feature_in_strip) const noexcept {
    return (feature_in_strip % 8 * 2 + feature_in_strip / 8) * scale_bytes;
  }
  constexpr int zero_place(int feature_in_strip) const noexcept {
    return kStripFeatures * scale_bytes + feature_in_strip % 8 * 2 + feature_in_strip / 8;
  }
  constexpr std::int64_t group_bytes() const noexcept {
    return blocks() * groups * kBlockStrips * record_bytes();
  }
};

/// Which feature and row of its 16 x 16 tile a code field of a lane's word is. Odd nibbles are features from 8 on.
struct FieldPlace {
  int feature;
  int row;
};

constexpr FieldPlace nibble_place(int lane, int nibble) noexcept {
  const int g = lane / 4;
  const int t = lane % 4;
  return {.feature = g + 8 * (nibble & 1), .row = 2 * t + 8 * ((nibble >> 1) & 1) + (nibble >> 2)};
}

/// A word with nothing but this code in one of its nibbles.
constexpr std::uint32_t nibble_bits(int nibble, std::uint32_t code) noexcept {
  if (nibble % 2 == 0) return code << (4 * nibble);
  const bool negative = code < 8;
  const std::uint32_t magnitude = negative ? 7 - code : code - 8;
  const std::uint32_t sign = negative ? 1 : 0;
  return magnitude << (4 * nibble) | sign << ((4 * nibble + 11) % 32);
}
/// The code that is no bits there.
constexpr std::uint32_t code_of_no_bits(int nibble) noexcept { return nibble % 2 == 0 ? 0 : 8; }

constexpr FieldPlace byte_place(int lane, int word_parity, int byte) noexcept {
  const int g = lane / 4;
  const int t = lane % 4;
  return {.feature = g + 8 * (byte >> 1), .row = 2 * t + 8 * word_parity + (byte & 1)};
}

/// A word of chunk_groups. Where every group is a power of two of whole chunks, kernels shift the
/// chunk instead of reading the word.
constexpr std::int32_t chunk_groups_word(const std::int32_t (&step_group)[4]) noexcept {
  std::int32_t word = step_group[0] << 4;
  for (int step = 1; step < 4; ++step) {
    const bool starts = step_group[step] != step_group[step - 1];
    word |= static_cast<std::int32_t>(starts) << step;
  }
  return word;
}

}  // namespace marlinq::cuda::sm80
