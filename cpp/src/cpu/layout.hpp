// The packed order of the CPU backend: one for every instruction set, number of rows and compute
// type.
//
// Output columns lie along the vector lanes. A module's N is padded to a multiple of 16 columns and
// cut into column blocks of 32 (the last may have 16); K is in packed row order (core/row_order.hpp),
// every group padded to a multiple of 8 rows. A block is contiguous along K, so a thread reads one
// stream:
//
//   4 bits (also 2 and 3):  [block][packed_row / 8][column in block][4 bytes]
//     byte j of a column's dword: low nibble = row j, high nibble = row j + 4 of the 8, so that
//     (w & 0x0f0f0f0f) and ((w >> 4) & 0x0f0f0f0f) are four consecutive rows each, one a byte.
//     In the dword's nibbles, lowest first: rows 0 4 1 5 2 6 3 7.
//   8 bits:                 [block][packed_row / 4][column in block][4 bytes], byte j = row j
//
//   scales  [block][group][column in block], the checkpoint's dtype
//   zeros   [block][group][column in block], code_bits each: bytes, or for 4 bits two columns a
//           byte, the even one low; absent when every zero point is the middle of the codes
//   bias    [column], float32, absent when the module has none
//
// Padding: codes, zero points and scales of padded columns are 0, codes of padded rows the middle;
// the input is 0 at padded rows, and padded columns are never stored. Zero points are those of the
// checkpoint; 2- and 3-bit codes are kept as they are in 4 bits; the middle is 2^(b-1) of the
// checkpoint's b.
#pragma once

#include <cstdint>

#include "core/integers.hpp"
#include "cpu/isa_table.hpp"

namespace marlinq::cpu {

struct Layout {
  static constexpr int kLanes = 16;  // columns of a 64-byte vector of dwords
  static constexpr int kBlockColumns =
      cpu::kBlockColumns;  // two cache lines a step: the pair that a prefetcher fetches together
  static constexpr int kRowAlignment = 8;  // rows of a 4-bit dword
  // Rows whose products are summed before the scale is applied. Short enough that a float32 chain
  // loses little (error grows with the chain), and a block of 32 columns unpacked to float32 is 16
  // KB of L1.
  static constexpr int kMaxRowBlock = cpu::kMaxRowBlock;
  // Rows of a step of the code stream: 4 bytes of each column.
  static constexpr int rows_per_dword(int code_bits) noexcept { return 32 / code_bits; }

  int code_bits = 4;   // 4 or 8
  std::int64_t n = 0;  // columns of the module
  std::int64_t packed_rows = 0;
  std::int64_t groups = 0;

  std::int64_t padded_columns() const noexcept { return round_up(n, kLanes); }
  std::int64_t blocks() const noexcept { return ceil_div(n, kBlockColumns); }
  int block_columns(std::int64_t block) const noexcept {
    const std::int64_t rest = padded_columns() - block * kBlockColumns;
    return rest < kBlockColumns ? static_cast<int>(rest) : kBlockColumns;
  }

  /// Byte offset of a block's first dword.
  std::int64_t code_offset(std::int64_t block) const noexcept {
    return block * kBlockColumns * packed_rows * code_bits / 8;
  }
  /// Byte offset, inside a block, of the dwords that hold packed row `row` (a multiple of
  /// rows_per_dword).
  std::int64_t row_offset(std::int64_t block, std::int64_t row) const noexcept {
    return row / rows_per_dword(code_bits) * block_columns(block) * 4;
  }
  /// Bit of row r (0 to rows_per_dword - 1) inside its column's dword.
  int bit_of_row(int r) const noexcept {
    return code_bits == 8 ? 8 * r : 8 * (r % 4) + 4 * (r / 4);
  }
  /// Element offset of a block's first scale or zero point.
  std::int64_t group_offset(std::int64_t block) const noexcept {
    return block * kBlockColumns * groups;
  }

  /// Byte offset of a block's first zero point.
  std::int64_t zero_offset(std::int64_t block) const noexcept {
    return group_offset(block) * code_bits / 8;
  }

  std::int64_t code_bytes() const noexcept {
    return padded_columns() * packed_rows * code_bits / 8;
  }
  std::int64_t group_elements() const noexcept { return padded_columns() * groups; }
  std::int64_t zero_bytes() const noexcept { return group_elements() * code_bits / 8; }
};

}  // namespace marlinq::cpu
