// int16 for many rows: x as whole integers of 16 bits, two of which an instruction multiplies with two codes in a word
// (Vec::dot_pairs). A run of a block is unpacked once to such pairs, for all tiles of rows. The sums are those of
// integer_gemm-inl.hpp, exact as well, so that a row has the same bits as among few.
// An object defines MARLINQ_CPU_ISA and its Vec and includes this; everything has internal linkage.
#pragma once

#include <cstdint>

#include "cpu/generic/block-inl.hpp"
#include "cpu/generic/integer_gemm-inl.hpp"
#include "cpu/generic/prepare-inl.hpp"

namespace marlinq::cpu::MARLINQ_CPU_ISA {
namespace {

// A run of a block, unpacked: [pair of packed rows, as first_row_of_pair orders them][column].
struct PairPanel {
  alignas(64) std::uint32_t pairs[kMaxRowBlock / 2 * kBlockColumns];
};

template <int kBits>
void unpack_pairs(const BlockTask& task, const RowBlock& run, PairPanel& panel) {
  constexpr int kStep = 32 / kBits;
  const std::int64_t stride = std::int64_t{4} * task.columns;
  const std::uint8_t* codes = task.codes + run.first / kStep * stride;
  std::uint32_t* pairs = panel.pairs;
  for (int row = 0; row < run.count;
       row += kStep, codes += stride, pairs += kStep / 2 * kBlockColumns) {
    for (int column = 0; column < task.columns; column += Vec::kLanes) {
      if (column % 16 == 0) __builtin_prefetch(codes + kPrefetch + 4 * column);
      const I words = Vec::load_words(codes + 4 * column);
      unrolled<kStep / 2>([&]<int kPair>() __attribute__((always_inline)) {
        Vec::store_words(pairs + kPair * kBlockColumns + column,
                         Vec::template pair_of_codes<kBits, kPair>(words));
      });
    }
  }
}

// Rows of a tile of one run of the task.
struct PairTile {
  const BlockTask& task;
  const PairPanel& panel;
  int run;
  const std::uint8_t* x;   // of the run: [pair][row]
  const RunInput* inputs;  // of the run
  float* result;           // [row][32]
};

template <int kRows, int kVectors>
[[gnu::noinline]] void pair_tile(const PairTile& tile, int column) {
  IntegerSums<kRows, kVectors, 1, 1> sum;
  start_sums<kRows, kVectors, 1, 1>(tile.inputs, sum);
  const std::uint8_t* x = tile.x;
  const std::uint32_t* pairs = tile.panel.pairs + column;
  const RowBlock& run = tile.task.runs[tile.run];
  for (int row = 0; row < run.count; row += 2, pairs += kBlockColumns, x += 4 * kRows) {
    I codes[kVectors];
    unrolled<kVectors>([&]<int v>() __attribute__((always_inline)) {
      codes[v] = Vec::load_words(reinterpret_cast<const std::uint8_t*>(pairs + Vec::kLanes * v));
      Vec::keep_in_register(codes[v]);
    });
    unrolled<kRows>([&]<int r>() __attribute__((always_inline)) {
      const I value = Vec::broadcast_word(x + 4 * r);
      unrolled<kVectors>([&]<int v>() __attribute__((always_inline)) {
        Vec::dot_pairs(sum[r][v][0][0], codes[v], value);
      });
    });
  }
  const std::int64_t first = std::int64_t{run.group} * tile.task.columns + column;
  end_run<kRows, kVectors, 1, 1>(
      tile.task, tile.inputs, first, sum,
      [&]<int r, int v>(F total, F scale) __attribute__((always_inline)) {
        add_to_result(tile.result + column + r * kBlockColumns + v * Vec::kLanes, total, scale,
                      tile.inputs[r].scale);
      });
}

template <int kRows>
void pair_columns(int rows, const PairTile& tile) {
  if constexpr (kRows > 1) {
    if (rows != kRows) {
      pair_columns<kRows - 1>(rows, tile);
      return;
    }
  }
  constexpr int kWide = Vec::kVectors * Vec::kLanes;
  int column = 0;
  for (; column + kWide <= tile.task.columns; column += kWide)
    pair_tile<kRows, Vec::kVectors>(tile, column);
  if constexpr (kWide > 16) {  // blocks have 16 or 32 columns
    for (; column < tile.task.columns; column += Vec::kLanes) pair_tile<kRows, 1>(tile, column);
  }
}

void gemm_pairs(const BlockTask& task) {
  clear_result(task);
  PairPanel panel;
  for (int run = 0; run < task.num_runs; ++run) {
    if (task.code_bits == 4) {
      unpack_pairs<4>(task, task.runs[run], panel);
    } else {
      unpack_pairs<8>(task, task.runs[run], panel);
    }
    std::int64_t first_row = 0;
    for (int tile = 0; tile < task.tiles.count; ++tile) {
      const int rows = rows_of_tile(task, tile);
      pair_columns<Vec::kPairRows>(
          rows, {.task = task,
                 .panel = panel,
                 .run = run,
                 .x = task.x + 2 * (first_row * task.packed_rows +
                                    std::int64_t{task.runs[run].first} * rows),
                 .inputs = task.run_inputs + first_row * task.num_runs + std::int64_t{run} * rows,
                 .result = task.result + first_row * kBlockColumns});
      first_row += rows;
    }
  }
}

float prepare_pairs(const PrepareTask& task) {
  Quantised q;
  quantise(task.values, kInt16Limit, q);
  store_run_inputs(task, q);
  std::uint16_t values[kMaxRowBlock];
  for (int p = 0; p < kMaxRowBlock; ++p) values[p] = static_cast<std::uint16_t>(q.value[p]);
  store_pairs(task, values);
  return q.largest;
}

// As Arithmetic::saturate.
template <class V>
std::int64_t saturate_pairs(std::int64_t rounds) {
  return saturate_sums<V>(rounds, 2, [](I& sum, I codes) __attribute__((always_inline)) {
    V::dot_pairs(sum, codes, codes);
  });
}

constexpr Arithmetic pairs_arithmetic(const Arithmetic& few_rows) {
  return {.native = true,
          .integer = true,
          .tile_rows = Vec::kPairRows,
          .element_bytes = 2,
          .prepare = prepare_pairs,
          .gemm = gemm_pairs,
          .saturate = saturate_pairs<Vec>,
          .most_few_rows = Vec::kMostFewRows,
          .few_rows = &few_rows};
}

constexpr Arithmetic kInt16OfFewRows = integer_arithmetic<2>();

// int16 and int8 on integers, and int16 of many rows in pairs.
constexpr IsaKernels with_pairs(IsaKernels entry) {
  entry = with_integers(entry);
  entry.int16 = pairs_arithmetic(kInt16OfFewRows);
  return entry;
}

}  // namespace
}  // namespace marlinq::cpu::MARLINQ_CPU_ISA
