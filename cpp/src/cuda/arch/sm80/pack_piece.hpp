// What the threads of the packing kernels do with one piece of a module's raw tensors, to put it
// into the order of layout.hpp. Plain functions of the thread's number: the host can run them too.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/arch/sm80/layout.hpp"
#include "cuda/problem.hpp"

#ifdef __CUDACC__
#define MARLINQ_UNROLL _Pragma("unroll")
#else
#define MARLINQ_UNROLL
#endif

namespace marlinq::cuda::sm80 {

/// A piece and where it goes; all pointers are to the device. The piece has rows of whole chunks or
/// all of K. Packed groups and chunks count from the segment's first.
struct PieceToPack {
  // The raw tensors of `columns` features of a module.
  const std::uint32_t* qweight = nullptr;  // [words, columns], from input row first_row on
  const std::uint32_t* qzeros = nullptr;   // null: every zero point is 2^(b-1)
  const void* scales = nullptr;            // [groups, columns], from raw group first_raw_group on
  FloatType scale_type = FloatType::kF16;
  std::int32_t bits = 4;
  /// What zero points are stored less: as in core/codes.hpp the repeated 1 for whole words, or 1 for
  /// each field of 3 bits; 0 in v2.
  std::uint32_t zero_add = 0;
  std::int32_t columns = 0;
  std::uint32_t words = 0;     // rows of qweight
  std::int32_t first_row = 0;  // 0 where rows are gathered
  std::int64_t first_raw_group = 0;
  // The segment.
  Layout layout;
  std::int32_t k = 0;
  const std::int32_t* source = nullptr;  // input row of each packed row; null: the same up to k
  const std::int32_t* chunk_groups = nullptr;
  const std::int32_t* raw_group = nullptr;  // of each packed group; null: the same
  std::uint32_t* codes = nullptr;           // 0 where nothing has been packed yet
  unsigned char* groups = nullptr;
  // What of it the piece fills.
  std::int64_t first_feature = 0;
  std::int64_t first_chunk = 0;
  std::int64_t chunks = 0;
  std::int64_t first_group = 0;
  std::int64_t num_groups = 0;

  constexpr std::int64_t first_block() const noexcept {
    return first_feature / Layout::kBlockFeatures;
  }
  constexpr std::int64_t end_block() const noexcept {
    return ceil_div(first_feature + columns, Layout::kBlockFeatures);
  }
  constexpr std::int64_t tiles() const noexcept { return (end_block() - first_block()) * chunks; }

  /// Whether both write to some tile, each a part of its features.
  constexpr bool shares_tiles(const PieceToPack& other) const noexcept {
    return codes == other.codes && first_block() < other.end_block() &&
           other.first_block() < end_block() && first_chunk < other.first_chunk + other.chunks &&
           other.first_chunk < first_chunk + chunks;
  }

  constexpr std::int64_t raw_group_of(std::int64_t group) const noexcept {
    return (raw_group == nullptr ? group : raw_group[group]) - first_raw_group;
  }

  constexpr std::uint32_t zero_point(std::int64_t group, std::int64_t column) const noexcept {
    const std::uint32_t mask = (1U << bits) - 1U;
    if (qzeros == nullptr) return 1U << (bits - 1);
    const std::uint32_t* row = qzeros + group * ceil_div(columns * bits, 32);
    const std::int64_t bit = column * bits;
    const int shift = static_cast<int>(bit % 32);
    if (bits == 3) {
      std::uint32_t value = row[bit / 32] >> shift;
      if (shift + 3 > 32) value |= row[bit / 32 + 1] << (32 - shift);
      return (value + zero_add) & mask;
    }
    return ((row[bit / 32] + zero_add) >> shift) & mask;
  }

  constexpr std::uint32_t scale_bits(std::int64_t group, std::int64_t column) const noexcept {
    const std::int64_t at = group * columns + column;
    return scale_type == FloatType::kF32 ? static_cast<const std::uint32_t*>(scales)[at]
                                         : static_cast<const std::uint16_t*>(scales)[at];
  }
  constexpr bool is_zero(std::uint32_t bits_of_scale) const noexcept {
    return (bits_of_scale & (scale_type == FloatType::kF32 ? 0x7FFFFFFFU : 0x7FFFU)) == 0;
  }
};

/// The codes of a tile of 64 features x one chunk, on their way through shared memory: a byte each.
struct CodeTile {
  static constexpr int kThreads = 128;
  static constexpr int kRowsOfThread = Layout::kChunkRows * Layout::kBlockFeatures / kThreads;
  // Lanes of a warp read 8 features of 4 rows 2 apart at once, each row from banks of its own.
  static constexpr int kRowBytes = Layout::kBlockFeatures + 4;
  static constexpr int kBytes = Layout::kChunkRows * kRowBytes;
  static constexpr int kWords = 4;  // that a thread writes at once

  std::int64_t block = 0;
  std::int64_t chunk = 0;
  bool whole = false;  // every feature of the block is the piece's

  constexpr CodeTile(const PieceToPack& piece, std::int64_t index) noexcept
      : block(piece.first_block() + index / piece.chunks),
        chunk(piece.first_chunk + index % piece.chunks),
        whole(block * Layout::kBlockFeatures >= piece.first_feature &&
              (block + 1) * Layout::kBlockFeatures <= piece.first_feature + piece.columns) {}

  /// Reads half a column: 32 rows, the warp's threads columns side by side. Features that are not
  /// the piece's become codes without bits.
  template <int kBits>
  constexpr void read(const PieceToPack& piece, int thread, std::uint8_t* tile) const noexcept {
    const int feature = thread % Layout::kBlockFeatures;
    const int first = thread / Layout::kBlockFeatures * kRowsOfThread;
    const std::int64_t wanted = block * Layout::kBlockFeatures + feature - piece.first_feature;
    const bool inside = wanted >= 0 && wanted < piece.columns;
    const std::uint32_t none =
        kBits == 8 ? 0 : code_of_no_bits(feature / (Layout::kStripFeatures / 2) % 2);
    // What is not there is read from a place that is, and left out afterwards.
    const std::int64_t column = inside ? wanted : 0;
    const std::int32_t chunk_groups = piece.chunk_groups[chunk];
    std::int64_t group = chunk_groups >> 4;
    for (int step = 0; step < Layout::kChunkSteps; ++step) {
      if (step > 0) group += chunk_groups >> step & 1;
      const int begin = step * Layout::kGroupAlignment;
      if (begin < first || begin >= first + kRowsOfThread) continue;
      const std::int64_t raw = piece.raw_group_of(group);
      const std::int32_t packed = static_cast<std::int32_t>(chunk) * Layout::kChunkRows + begin;
      const Step codes = piece.source == nullptr ? plain_step<kBits>(piece, packed, column)
                                                 : gathered_step<kBits>(piece, packed, column);
      const std::uint32_t zero = piece.zero_point(raw, column);
      const bool counts = !piece.is_zero(piece.scale_bits(raw, column));
      MARLINQ_UNROLL
      for (int i = 0; i < Layout::kGroupAlignment; ++i) {
        const std::uint32_t code = counts && codes.present[i] ? codes.code[i] : zero;
        tile[(begin + i) * kRowBytes + feature] = static_cast<std::uint8_t>(inside ? code : none);
      }
    }
  }

  /// The four words of a lane of strip thread / 32 of the block. `half` is of the chunk's rows, where
  /// codes are bytes; else 0.
  template <int kCodeBits>
  constexpr void gather(int thread, int half, const std::uint8_t* tile,
                        std::uint32_t (&words)[kWords]) const noexcept {
    const int lane = thread % Layout::kLanes;
    const int strip = thread / Layout::kLanes * Layout::kStripFeatures;
    MARLINQ_UNROLL
    for (int word = 0; word < kWords; ++word) {
      const int step = kCodeBits == 4 ? word : half * 2 + word / 2;
      words[word] = 0;
      MARLINQ_UNROLL
      for (int field = 0; field < 32 / kCodeBits; ++field) {
        const FieldPlace place =
            kCodeBits == 4 ? nibble_place(lane, field) : byte_place(lane, word % 2, field);
        const int row = step * Layout::kGroupAlignment + place.row;
        const std::uint32_t code = tile[row * kRowBytes + strip + place.feature];
        words[word] |= kCodeBits == 4 ? nibble_bits(field, code) : code << (field * kCodeBits);
      }
    }
  }

  /// Index of the first of those words.
  constexpr std::int64_t place(const PieceToPack& piece, int thread, int half) const noexcept {
    return piece.layout.word(block * Layout::kBlockStrips + thread / Layout::kLanes, chunk, half,
                             thread % Layout::kLanes, 0);
  }

 private:
  // One column of 16 packed rows.
  struct Step {
    std::uint32_t code[Layout::kGroupAlignment] = {};
    bool present[Layout::kGroupAlignment] = {};  // false: padding
  };

  // Packed rows are input rows: whole words, each read once.
  template <int kBits>
  static constexpr Step plain_step(const PieceToPack& piece, std::int32_t packed,
                                   std::int64_t column) noexcept {
    constexpr int kWordsOfStep = kBits == 3 ? 2 : kBits / 2;  // 48 bits of 3 begin at bit 0 or 16
    const auto bit = static_cast<std::uint32_t>(packed - piece.first_row) * kBits;
    std::uint32_t words[kWordsOfStep] = {};
    MARLINQ_UNROLL
    for (int i = 0; i < kWordsOfStep; ++i) {
      const std::int64_t word = std::min(bit / 32 + i, piece.words - 1);
      words[i] = piece.qweight[word * piece.columns + column];
    }
    Step step;
    MARLINQ_UNROLL
    for (int i = 0; i < Layout::kGroupAlignment; ++i) {
      if constexpr (kBits == 3) {
        const std::uint64_t both = words[0] | std::uint64_t{words[1]} << 32;
        step.code[i] = static_cast<std::uint32_t>(both >> (bit % 32 + 3 * i)) & 7U;
      } else {
        step.code[i] = words[i * kBits / 32] >> (i * kBits % 32) & ((1U << kBits) - 1U);
      }
      step.present[i] = packed + i < piece.k;
    }
    return step;
  }

  // Every row from where it stands; all reads are on their way before the first is used.
  template <int kBits>
  static constexpr Step gathered_step(const PieceToPack& piece, std::int32_t packed,
                                      std::int64_t column) noexcept {
    const std::uint32_t* const words = piece.qweight + column;
    const auto pitch = static_cast<std::uint32_t>(piece.columns);
    std::uint32_t bits[Layout::kGroupAlignment] = {};  // where a code begins in its column
    std::uint32_t low[Layout::kGroupAlignment] = {};   // the word that holds its beginning
    Step step;
    MARLINQ_UNROLL
    for (int i = 0; i < Layout::kGroupAlignment; ++i) {
      const std::int32_t row = piece.source[packed + i];
      step.present[i] = row >= 0;
      bits[i] = static_cast<std::uint32_t>(row < 0 ? 0 : row) * kBits;
      low[i] = words[std::uint64_t{bits[i] / 32} * pitch];
    }
    MARLINQ_UNROLL
    for (int i = 0; i < Layout::kGroupAlignment; ++i) {
      const std::uint32_t shift = bits[i] % 32;
      std::uint32_t code = low[i] >> shift;
      if constexpr (kBits == 3) {  // it may end in the next word
        if (shift > 29) code |= words[std::uint64_t{bits[i] / 32 + 1} * pitch] << (32 - shift);
      }
      step.code[i] = code & ((1U << kBits) - 1U);
    }
    return step;
  }
};

/// Whether float16 has all numbers of bfloat16 between these magnitudes, and 0: such numbers have 8 significant bits, and
/// float16 has multiples of 2^-24.
constexpr bool has_as_half(float least, float most) noexcept {
  return most == 0.0F || (least >= 0x1p-17F && most < 0x1p16F);
}

/// The float16 that is such a bfloat16.
constexpr std::uint16_t bfloat16_as_half(std::uint16_t bits) noexcept {
  constexpr int kLeastExponent = 127 - 14;  // of a bfloat16 that is a normal float16
  const int exponent = bits >> 7 & 0xff;
  const int significand = (bits & 0x7f) << 3;
  if (exponent == 0) return bits & 0x8000U;
  const int magnitude = exponent >= kLeastExponent
                            ? (exponent - kLeastExponent + 1) << 10 | significand
                            : (0x400 | significand) >> (kLeastExponent - exponent);
  return static_cast<std::uint16_t>((bits & 0x8000U) | static_cast<unsigned>(magnitude));
}

/// Scales of bfloat16 that are to become float16, of packed weights of one shape.
struct ScalesToConvert {
  unsigned char* records;  // of the first weight
  std::int64_t count;      // of a weight
  std::int32_t record_bytes;
  std::int64_t weights;
  std::int64_t weight_bytes;  // from one to the next

  /// A piece is what 16 bytes hold of a record's scales.
  static constexpr int kPieces = Layout::kStripFeatures / 8;
  constexpr std::int64_t pieces() const noexcept { return weights * count * kPieces; }
  constexpr unsigned char* piece(std::int64_t index) const noexcept {
    const std::int64_t record = index / kPieces;
    return records + record / count * weight_bytes + record % count * record_bytes +
           index % kPieces * 16;
  }
};

/// Writes the scale and zero point of one feature and group; index below columns x num_groups.
constexpr void pack_scale(const PieceToPack& piece, std::int64_t index) noexcept {
  const std::int64_t column = index % piece.columns;
  const std::int64_t group = piece.first_group + index / piece.columns;
  const std::int64_t raw = piece.raw_group_of(group);
  const std::int64_t feature = piece.first_feature + column;
  const int in_strip = static_cast<int>(feature % Layout::kStripFeatures);
  unsigned char* record =
      piece.groups + piece.layout.record(feature / Layout::kStripFeatures, group);
  std::uint32_t bits = piece.scale_bits(raw, column);
  if (piece.is_zero(bits)) {  // 1
    bits = piece.scale_type == FloatType::kF32   ? 0x3F800000U
           : piece.scale_type == FloatType::kF16 ? 0x3C00U
                                                 : 0x3F80U;
  }
  unsigned char* target = record + piece.layout.scale_place(in_strip);
  for (int byte = 0; byte < piece.layout.scale_bytes; ++byte) {
    target[byte] = static_cast<unsigned char>(bits >> (8 * byte));
  }
  if (piece.layout.has_zeros) {
    record[piece.layout.zero_place(in_strip)] =
        static_cast<unsigned char>(piece.zero_point(raw, column));
  }
}

}  // namespace marlinq::cuda::sm80

#undef MARLINQ_UNROLL
