// The packed order of the sm_80 kernels: weights are operand A of mma.m16n8k16.
//
// A strip is 16 output features; K is in packed row order (core/row_order.hpp), every group padded
// to a multiple of 16 rows and the whole to a multiple of 64. Lane = 4 g + t of a warp (g 0..7, t
// 0..3).
//
//   4 bits (also 2 and 3)  [strip][row / 64][lane][4 words]: word j serves the 16 rows from 16 j
//   on.
//     nibble i of a word, bits 4i..4i+3:
//       0, 4: feature g,     rows 2t, 2t+1        2, 6: feature g,     rows 2t+8, 2t+9
//       1, 5: feature g + 8, rows 2t, 2t+1        3, 7: feature g + 8, rows 2t+8, 2t+9
//     so nibbles r and r + 4 are the two halves of the fragment's register r.
//   8 bits                 [strip][row / 32][lane][4 words]: words 2j, 2j+1 serve the 16 rows from
//   16 j on.
//     word 2j + h: bytes 0, 1: feature g, rows 2t+8h, 2t+8h+1; bytes 2, 3: the same rows of feature
//     g + 8.
//   scales  [strip][group][g][2]: features g, g + 8, the checkpoint's dtype; groups without rows
//   are left out zeros   the same, one byte; always present bias    [feature] float32
//
// A strip is contiguous along K: a warp reads 512 bytes at a time, 16 a lane, each used by that
// lane alone. Padding: codes are the zero point (their product is 0), scales and zero points of
// padded features 0.
#pragma once

#include <cstdint>

#include "core/integers.hpp"

namespace marlinq::cuda::sm80 {

struct Layout {
  static constexpr int kStripFeatures = 16;
  static constexpr int kGroupAlignment = 16;  // rows of one mma
  static constexpr int kRowAlignment = 64;
  static constexpr int kLanes = 32;

  int code_bits = 4;
  std::int64_t n = 0;
  std::int64_t packed_rows = 0;
  std::int64_t groups = 0;  // that have rows

  constexpr std::int64_t strips() const noexcept { return ceil_div(n, kStripFeatures); }
  constexpr int rows_per_chunk() const noexcept { return code_bits == 4 ? 64 : 32; }
  constexpr std::int64_t chunks() const noexcept { return packed_rows / rows_per_chunk(); }

  /// Index of the 32-bit word that `lane` holds for strip, packed row.
  constexpr std::int64_t word(std::int64_t strip, std::int64_t chunk, int lane,
                              int word_in_lane) const noexcept {
    return ((strip * chunks() + chunk) * kLanes + lane) * 4 + word_in_lane;
  }
  constexpr std::int64_t words() const noexcept { return strips() * chunks() * kLanes * 4; }
  /// Element of scales and zeros.
  constexpr std::int64_t group_element(std::int64_t strip, std::int64_t group,
                                       int feature) const noexcept {
    return ((strip * groups + group) * 8 + feature % 8) * 2 + feature / 8;
  }
  constexpr std::int64_t group_elements() const noexcept {
    return strips() * groups * kStripFeatures;
  }
};

/// Which feature and row of its 16 x 16 tile a code field of a lane's word is.
struct FieldPlace {
  int feature;
  int row;
};

constexpr FieldPlace nibble_place(int lane, int nibble) noexcept {
  const int g = lane / 4;
  const int t = lane % 4;
  return {.feature = g + 8 * (nibble & 1), .row = 2 * t + 8 * ((nibble >> 1) & 1) + (nibble >> 2)};
}

constexpr FieldPlace byte_place(int lane, int word_parity, int byte) noexcept {
  const int g = lane / 4;
  const int t = lane % 4;
  return {.feature = g + 8 * (byte >> 1), .row = 2 * t + 8 * word_parity + (byte & 1)};
}

}  // namespace marlinq::cuda::sm80
