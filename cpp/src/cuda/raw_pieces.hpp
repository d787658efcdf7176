// How the raw tensors of a layer travel to a device: in pieces that are packed one by one, so that
// little memory holds them and the bus stays busy while kernels pack. Pure host code.
#pragma once

#include <cstdint>
#include <vector>

#include "marlinq/gptq.hpp"

namespace marlinq::cuda {

/// Rows of a host tensor; on the device they follow one another.
struct RawRows {
  const std::uint8_t* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t row_bytes = 0;
  std::int64_t pitch = 0;   // from row to row on the host
  std::int64_t offset = 0;  // of the piece on the device

  constexpr std::int64_t bytes() const noexcept { return rows * row_bytes; }
  constexpr bool contiguous() const noexcept { return rows == 1 || row_bytes == pitch; }
};

/// Input rows [first_row, first_row + rows) x output features [first_column, first_column +
/// columns) of a module, and the groups [first_group, first_group + groups) that these rows are
/// of. Either all rows or all columns. Whole words of qweight and qzeros, whole steps of packing:
/// boundaries are multiples of 64.
struct RawPiece {
  std::size_t layer = 0;   // of those that travel together
  std::size_t module = 0;  // of the layer
  std::int64_t first_row = 0;
  std::int64_t rows = 0;
  std::int64_t first_column = 0;
  std::int64_t columns = 0;
  std::int64_t first_group = 0;
  std::int64_t groups = 0;
  RawRows qweight;  // [words of the rows, columns]
  RawRows scales;   // [groups, columns]
  RawRows qzeros;   // [groups, words of the columns]; no rows: every zero point is 2^(b-1)
  /// Room on the device for the packing's own table, an int for each group of the checkpoint; none
  /// where the rows are in plain order.
  std::int64_t table = 0;  // offset
  std::int64_t bytes = 0;

  /// Places the piece so many bytes further on.
  void move(std::int64_t by) noexcept {
    for (RawRows* rows_of : {&qweight, &scales, &qzeros}) rows_of->offset += by;
    if (table != 0) table += by;
  }
};

/// Bytes of the layer's qweight, scales and qzeros.
std::int64_t raw_bytes(const GptqWeights& layer);

/// Cuts a layer, as check_structure() leaves it, into pieces of `target` bytes at most, or as small
/// as they come. Rows in plain order travel as whole rows of the tensors; where they have to be
/// gathered, a piece has all of them and some of the columns.
std::vector<RawPiece> plan_pieces(const GptqWeights& layer, std::int64_t target);

}  // namespace marlinq::cuda
