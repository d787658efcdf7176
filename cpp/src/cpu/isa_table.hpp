// What an instruction set offers to the backend: plain data and function pointers. Included by the
// objects that are compiled for one instruction set, so it holds no function and no standard
// container.
#pragma once

#include <cstdint>

#include "core/row_block.hpp"

namespace marlinq::cpu {

/// Bits of the mask by which a kernel names its needs and features.hpp what the machine offers.
enum Feature : std::uint32_t {
  kAvx2 = 1U << 0,
  kFma = 1U << 1,
  kF16c = 1U << 2,
  kAvx512 = 1U << 3,  // F, BW, DQ and VL
  kAvx512Vnni = 1U << 4,
  kAvx512Bf16 = 1U << 5,
  kAvxVnni = 1U << 6,
};

enum class FloatType : std::uint8_t { kF32, kF16, kBF16 };

/// Rows cut into tiles whose sizes differ by at most one: the first `larger` have base + 1 rows.
struct RowTiles {
  std::int32_t count;
  std::int32_t base;
  std::int32_t larger;
};

/// What a kernel needs to know of one row of x in one run of packed rows, besides the row itself.
struct RunInput {
  float scale;         // x is about its integers times this; 1 where x is held as floats
  std::int32_t start;  // -middle * (sum of x's integers); 0 where x is held as floats
  float sum;           // of x, in the unit that `scale` multiplies
};

/// Takes some consecutive runs of one row of x to the form in which a kernel reads them. Integers
/// and their scale are those of all the runs together: at most kMaxRowBlock packed rows.
struct PrepareTask {
  const float* values;  // kMaxRowBlock of them: one a packed row, then 0
  const RowBlock* runs;
  std::int32_t num_runs;
  std::int32_t code_bits;
  std::int32_t middle;
  std::int32_t tile_rows;  // rows of the tile
  std::int32_t row;        // inside the tile
  std::uint8_t* x;         // of the tile
  RunInput* run_inputs;    // [run][row of the tile], from the task's first run on; may be null
};

/// The product of some rows of x with one column block of a module; layout.hpp has the packed
/// order.
struct BlockTask {
  const std::uint8_t* codes;   // of the block
  const std::uint8_t* scales;  // of the block
  const std::uint8_t* zeros;   // of the block; null: every zero point is `middle`
  FloatType scale_type;
  std::int32_t code_bits;  // 4 or 8
  std::int32_t middle;     // 2^(b-1) of the checkpoint's bits
  std::int32_t columns;    // 16 or 32
  const RowBlock* runs;
  std::int32_t num_runs;
  std::int64_t packed_rows;
  /// Tile after tile, as `prepare` of the same arithmetic wrote them.
  const std::uint8_t* x;
  /// Tile after tile of [run][row of the tile]; null where the arithmetic has floats and `zeros`
  /// is null.
  const RunInput* run_inputs;
  std::int32_t rows;  // 1 to kMaxTaskRows
  RowTiles tiles;     // of `rows`, at most tile_rows each
  float* result;      // [row][32], 64-byte aligned
};

// A block of columns and a run of rows; layout.hpp says why these.
inline constexpr std::int32_t kBlockColumns = 32;
inline constexpr std::int32_t kMaxRowBlock = 128;

// Two 64-row tasks' results (8 KB each), an unpacked panel (16 KB) and the x of one run (32 KB at
// 64 rows) stay within L1 and L2 of any processor of the last ten years.
inline constexpr std::int32_t kMaxTaskRows = 64;

/// How many of the runs, from the first on, have one scale where x is held as integers: as many as are at most
/// kMaxRowBlock packed rows.
[[gnu::always_inline]] inline std::int32_t runs_of_one_scale(const RowBlock* runs,
                                                             std::int32_t num_runs) {
  std::int32_t rows = 0;
  std::int32_t run = 0;
  for (; run < num_runs && rows + runs[run].count <= kMaxRowBlock; ++run) rows += runs[run].count;
  return run;
}

/// One compute type on one instruction set.
struct Arithmetic {
  bool native;             // false: x is rounded as the compute type says, the product is float32's
  bool integer;            // run_inputs are always wanted
  std::int32_t tile_rows;  // most rows of a tile of x
  std::int32_t element_bytes;  // of x
  /// Returns the largest finite magnitude of the values.
  float (*prepare)(const PrepareTask&);
  void (*gemm)(const BlockTask&);
  /// Runs the inner instructions of `gemm` on registers alone, `rounds` times as many as hide their
  /// latency. Returns how many products of a weight and an activation that is, each with its sum.
  std::int64_t (*saturate)(std::int64_t rounds);
  /// What multiplies at most so many rows instead, with the same results to the last bit; null: nothing does. Its elements of
  /// x have as many bytes.
  std::int32_t most_few_rows = 0;
  const Arithmetic* few_rows = nullptr;
};

/// One entry of the table of instruction sets.
struct IsaKernels {
  const char* name;
  std::int32_t priority;   // the usable entry with the highest is chosen
  std::uint32_t required;  // mask of Feature

  bool int16_by_default;  // what compute "auto" is; else float32

  // What follows is filled in by generic/kernels-inl.hpp and generic/integer_gemm-inl.hpp.
  Arithmetic float32 = {};
  Arithmetic int16 = {};
  Arithmetic bfloat16 = {};
  Arithmetic int8 = {};

  void (*to_float)(FloatType type, const std::uint8_t* source, float* target,
                   std::int64_t count) = nullptr;
  void (*from_float)(FloatType type, const float* source, std::uint8_t* target,
                     std::int64_t count) = nullptr;
  void (*sigmoid)(const float* x, float* y, std::int64_t count) = nullptr;
};

}  // namespace marlinq::cpu
