#include "cuda/raw_pieces.hpp"

#include <algorithm>
#include <cstdint>

#include "core/codes.hpp"
#include "core/integers.hpp"

namespace marlinq::cuda {
namespace {

// Rows and columns of the smallest piece: 64 codes of any width are whole words, and packed orders
// are made of steps and blocks that divide 64.
constexpr std::int64_t kUnit = 64;
// Kernels read 16 bytes at a time at most; a DMA likes whole lines.
constexpr std::int64_t kAlignment = 256;
// Groups of whole steps of 16 rows keep the order of the rows when they are packed.
constexpr std::int64_t kStepRows = 16;

std::int64_t size_of_scale(const ValidatedModule& part) {
  return static_cast<std::int64_t>(size_of(part.scale_dtype));
}

std::int64_t raw_bytes(const GptqWeights& layer, const ValidatedModule& part) {
  std::int64_t bytes = packed_words(layer.k, layer.bits) * part.n * 4;
  bytes += layer.groups * part.n * size_of_scale(part);
  if (part.qzeros != nullptr) bytes += layer.groups * packed_words(part.n, layer.bits) * 4;
  return bytes;
}

class ModuleCutter {
 public:
  ModuleCutter(const GptqWeights& layer, std::size_t module)
      : layer_(layer), part_(layer.modules[module]), module_(module) {}

  void cut(std::int64_t target, std::vector<RawPiece>& pieces) const {
    const bool plain =
        !part_.act_order && (layer_.groups == 1 || layer_.group_size % kStepRows == 0);
    if (plain && piece(0, std::min(kUnit, layer_.k), 0, part_.n).bytes <= target) {
      cut(layer_.k, target, [this](std::int64_t step) { return row_pieces(step); }, pieces);
    } else {
      cut(part_.n, target, [this](std::int64_t step) { return column_pieces(step); }, pieces);
    }
  }

 private:
  static bool fits(const std::vector<RawPiece>& pieces, std::int64_t target) {
    return std::ranges::all_of(pieces,
                               [target](const RawPiece& one) { return one.bytes <= target; });
  }

  std::vector<RawPiece> row_pieces(std::int64_t step) const {
    std::vector<RawPiece> pieces;
    for (std::int64_t row = 0; row < layer_.k; row += step) {
      pieces.push_back(piece(row, std::min(step, layer_.k - row), 0, part_.n));
    }
    return pieces;
  }
  std::vector<RawPiece> column_pieces(std::int64_t step) const {
    std::vector<RawPiece> pieces;
    for (std::int64_t column = 0; column < part_.n; column += step) {
      pieces.push_back(piece(0, layer_.k, column, std::min(step, part_.n - column)));
    }
    return pieces;
  }

  // As few pieces as fit the target, and those as even as can be.
  template <class PiecesOf>
  void cut(std::int64_t extent, std::int64_t target, const PiecesOf& pieces_of,
           std::vector<RawPiece>& result) const {
    const std::int64_t units = ceil_div(extent, kUnit);
    std::int64_t count = std::min(units, ceil_div(raw_bytes(layer_, part_), target));
    for (;;) {
      const std::vector<RawPiece> pieces = pieces_of(ceil_div(units, count) * kUnit);
      if (count == units || fits(pieces, target)) {
        result.insert(result.end(), pieces.begin(), pieces.end());
        return;
      }
      ++count;
    }
  }

  RawPiece piece(std::int64_t row, std::int64_t rows, std::int64_t column,
                 std::int64_t columns) const {
    const int bits = layer_.bits;
    const bool all_rows = rows == layer_.k;
    RawPiece p;
    p.module = module_;
    p.first_row = row;
    p.rows = rows;
    p.first_column = column;
    p.columns = columns;
    p.first_group = all_rows ? 0 : row / layer_.group_size;
    p.groups = all_rows ? layer_.groups : (row + rows - 1) / layer_.group_size + 1 - p.first_group;
    p.qweight = place(p, part_.qweight, packed_words(row, bits), packed_words(rows, bits), column,
                      columns, 4, part_.n * 4);
    p.scales = place(p, part_.scales, p.first_group, p.groups, column, columns,
                     size_of_scale(part_), part_.n * size_of_scale(part_));
    if (part_.qzeros != nullptr) {
      p.qzeros = place(p, part_.qzeros, p.first_group, p.groups, packed_words(column, bits),
                       packed_words(columns, bits), 4, packed_words(part_.n, bits) * 4);
    }
    if (part_.act_order) {
      p.table = p.bytes;
      p.bytes = round_up(p.bytes + layer_.groups * 4, kAlignment);
    }
    return p;
  }

  static RawRows place(RawPiece& piece, const std::uint8_t* tensor, std::int64_t first_row,
                       std::int64_t rows, std::int64_t first_element, std::int64_t elements,
                       std::int64_t size, std::int64_t pitch) {
    const RawRows result{.data = tensor + first_row * pitch + first_element * size,
                         .rows = rows,
                         .row_bytes = elements * size,
                         .pitch = pitch,
                         .offset = piece.bytes};
    piece.bytes = round_up(piece.bytes + result.bytes(), kAlignment);
    return result;
  }

  const GptqWeights& layer_;
  const ValidatedModule& part_;
  std::size_t module_;
};

}  // namespace

std::int64_t raw_bytes(const GptqWeights& layer) {
  std::int64_t bytes = 0;
  for (const ValidatedModule& part : layer.modules) bytes += raw_bytes(layer, part);
  return bytes;
}

std::vector<RawPiece> plan_pieces(const GptqWeights& layer, std::int64_t target) {
  std::vector<RawPiece> pieces;
  for (std::size_t i = 0; i < layer.modules.size(); ++i) {
    ModuleCutter(layer, i).cut(target, pieces);
  }
  return pieces;
}

}  // namespace marlinq::cuda
