// The product of one column block with x held as floats: float32, or pairs of bfloat16 where a unit
// multiplies those. An object defines MARLINQ_CPU_ISA and its Vec (isa/<name>/vec.hpp) and includes
// this; everything has internal linkage.
//
// For each run of at most 128 packed rows of one group, and each output:
//   sum     = x[first] * (q - middle) + ... in one fixed order, one chain, float32
//   sum    -= (zero - middle) * (sum of x over the run)         where zero points differ
//   result += scale * sum
// The order does not depend on the number of rows, so a row's result does not depend on its batch.
//
// Few rows dequantise in registers, straight from the codes. From a second tile of rows on, a run
// is unpacked once to a panel for all tiles: same values, same order, same result.
//
// A Unit says what one dword of x holds: kRowsPerDword packed rows, which `decode` makes a vector of
// weights for and `multiply_add` multiplies.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/generic/block-inl.hpp"

namespace marlinq::cpu::MARLINQ_CPU_ISA {
namespace {

// A run of a block, unpacked: [dword of x in the run][column].
struct Panel {
  alignas(64) float values[kMaxRowBlock * kBlockColumns];
};

// Bit of row kRow inside its column's dword.
template <int kBits, int kRow>
constexpr int kBitOfRow = kBits == 8 ? 8 * kRow : 8 * (kRow % 4) + 4 * (kRow / 4);

struct Float32Unit {
  static constexpr int kRowsPerDword = 1;
  static constexpr int kTileRows = Vec::kTileRows;

  Vec::Decoder decoder;
  explicit Float32Unit(std::int32_t middle) : decoder(middle) {}

  template <int kBits, int kDword>
  MARLINQ_INLINE F decode(I words) const {
    return decoder.template decode<kBits, kBitOfRow<kBits, kDword>>(words);
  }
  MARLINQ_INLINE static void multiply_add(F& sum, F x, F weight) {
    sum = Vec::multiply_add(x, weight, sum);
  }
};

template <class Unit>
struct TileSource {
  const BlockTask& task;
  const Unit& unit;
  const Panel* panel;  // null: from the codes
  int run;
};

// Adds kRuns runs of equal length, from the source's on, to a sum each. Side by side they keep the
// multipliers busy where one row has too few chains; every sum is what it is alone. What follows these
// runs is prefetched in its own order, so that memory sees one stream.
template <int kBits, class Unit, int kRuns, int kRows, int kVectors>
MARLINQ_INLINE void accumulate_codes(const TileSource<Unit>& source, int column, const float* tile,
                                     F (&sum)[kRuns][kRows][kVectors]) {
  constexpr int kStep = 32 / kBits;
  constexpr int kDwords = kStep / Unit::kRowsPerDword;
  const BlockTask& task = source.task;
  const Unit unit = source.unit;
  const std::int64_t stride = std::int64_t{4} * task.columns;
  const std::uint8_t* codes[kRuns];
  const float* x[kRuns];
  for (int u = 0; u < kRuns; ++u) {
    const RowBlock& run = task.runs[source.run + u];
    codes[u] = task.codes + run.first / kStep * stride + std::int64_t{4} * column;
    x[u] = tile + std::int64_t{run.first / Unit::kRowsPerDword} * kRows;
  }
  const std::uint8_t* ahead = codes[0] + kPrefetch;
  if constexpr (kRuns > 1) {
    // Further than the next runs by half of them: the last of those is read as soon as the first.
    const std::int64_t run_bytes = task.runs[source.run].count / kStep * stride;
    ahead = codes[0] + (kRuns + kRuns / 2) * run_bytes;
  }
  for (int row = 0; row < task.runs[source.run].count; row += kStep) {
    I words[kRuns][kVectors];
    unrolled<kRuns>([&]<int u>() __attribute__((always_inline)) {
      unrolled<kVectors>([&]<int v>() __attribute__((always_inline)) {
        words[u][v] = Vec::load_words(codes[u] + 4 * Vec::kLanes * v);
        if constexpr (v * Vec::kLanes % 16 == 0) {
          __builtin_prefetch(ahead + u * stride + 4 * Vec::kLanes * v);
        }
      });
    });
    unrolled<kDwords>([&]<int kDword>() __attribute__((always_inline)) {
      unrolled<kRuns>([&]<int u>() __attribute__((always_inline)) {
        F weight[kVectors];
        unrolled<kVectors>([&]<int v>() __attribute__((always_inline)) {
          weight[v] = unit.template decode<kBits, kDword>(words[u][v]);
        });
        unrolled<kRows>([&]<int r>() __attribute__((always_inline)) {
          const F value = Vec::broadcast(x[u][kDword * kRows + r]);
          unrolled<kVectors>([&]<int v>() __attribute__((always_inline)) {
            Unit::multiply_add(sum[u][r][v], value, weight[v]);
          });
        });
      });
    });
    ahead += kRuns * stride;
    unrolled<kRuns>([&]<int u>() __attribute__((always_inline)) {
      codes[u] += stride;
      x[u] += kDwords * kRows;
    });
  }
}

template <class Unit, int kRows, int kVectors>
MARLINQ_INLINE void accumulate_panel(const TileSource<Unit>& source, int column, const float* tile,
                                     F (&sum)[kRows][kVectors]) {
  const RowBlock& run = source.task.runs[source.run];
  const float* x = tile + std::int64_t{run.first / Unit::kRowsPerDword} * kRows;
  const float* weights = source.panel->values + column;
  for (int row = 0; row < run.count;
       row += Unit::kRowsPerDword, weights += kBlockColumns, x += kRows) {
    F weight[kVectors];
    unrolled<kVectors>([&]<int v>() __attribute__((always_inline)) {
      weight[v] = Vec::load(weights + Vec::kLanes * v);
    });
    unrolled<kRows>([&]<int r>() __attribute__((always_inline)) {
      const F value = Vec::broadcast(x[r]);
      unrolled<kVectors>([&]<int v>() __attribute__((always_inline)) {
        Unit::multiply_add(sum[r][v], value, weight[v]);
      });
    });
  }
}

template <int kBits, class Unit>
void unpack(const BlockTask& task, const RowBlock& run, const Unit& unit, Panel& panel) {
  constexpr int kStep = 32 / kBits;
  constexpr int kDwords = kStep / Unit::kRowsPerDword;
  const std::int64_t stride = std::int64_t{4} * task.columns;
  const std::uint8_t* codes = task.codes + run.first / kStep * stride;
  float* weights = panel.values;
  for (int row = 0; row < run.count;
       row += kStep, codes += stride, weights += kDwords * kBlockColumns) {
    for (int column = 0; column < task.columns; column += Vec::kLanes) {
      if (column % 16 == 0) __builtin_prefetch(codes + kPrefetch + 4 * column);
      const I words = Vec::load_words(codes + 4 * column);
      unrolled<kDwords>([&]<int kDword>() __attribute__((always_inline)) {
        Vec::store(weights + kDword * kBlockColumns + column,
                   unit.template decode<kBits, kDword>(words));
      });
    }
  }
}

// Adds scale * (sum - (zero - middle) * x_sum) of columns [column, column + kVectors * lanes) to
// the result.
template <int kRows, int kVectors>
MARLINQ_INLINE void apply_group(const BlockTask& task, int run, int column, int first_row,
                                const F (&sum)[kRows][kVectors]) {
  const std::int64_t first = std::int64_t{task.runs[run].group} * task.columns + column;
  F scale[kVectors];
  load_scales(task, first, scale);
  unrolled<kVectors>([&]<int v>() __attribute__((always_inline)) {
    float* result = task.result + first_row * kBlockColumns + column + v * Vec::kLanes;
    if (task.zeros == nullptr) {
      unrolled<kRows>([&]<int r>() __attribute__((always_inline)) {
        float* place = result + r * kBlockColumns;
        Vec::store(place, Vec::multiply_add(scale[v], sum[r][v], Vec::load(place)));
      });
    } else {
      const F zero = load_zeros(task, first + v * Vec::kLanes);
      const RunInput* inputs =
          task.run_inputs + std::int64_t{first_row} * task.num_runs + std::int64_t{run} * kRows;
      unrolled<kRows>([&]<int r>() __attribute__((always_inline)) {
        float* place = result + r * kBlockColumns;
        const F corrected =
            Vec::negative_multiply_add(zero, Vec::broadcast(inputs[r].sum), sum[r][v]);
        Vec::store(place, Vec::multiply_add(scale[v], corrected, Vec::load(place)));
      });
    }
  });
}

template <class Unit, int kRuns, int kRows, int kVectors>
[[gnu::noinline]] void run_tile(const TileSource<Unit>& source, int column, int first_row,
                                const float* tile) {
  const BlockTask& task = source.task;
  F sum[kRuns][kRows][kVectors];
  unrolled<kRuns>([&]<int u>() __attribute__((always_inline)) {
    unrolled<kRows>([&]<int r>() __attribute__((always_inline)) {
      unrolled<kVectors>([&]<int v>()
                             __attribute__((always_inline)) { sum[u][r][v] = Vec::zero(); });
    });
  });
  if (source.panel != nullptr) {
    accumulate_panel<Unit, kRows, kVectors>(source, column, tile, sum[0]);
  } else if (task.code_bits == 4) {
    accumulate_codes<4>(source, column, tile, sum);
  } else {
    accumulate_codes<8>(source, column, tile, sum);
  }
  unrolled<kRuns>([&]<int u>() __attribute__((always_inline)) {
    apply_group<kRows, kVectors>(task, source.run + u, column, first_row, sum[u]);
  });
}

template <class Unit, int kRuns, int kRows>
void run_columns(const TileSource<Unit>& source, int first_row, const float* tile) {
  constexpr int kWide = Vec::kVectors * Vec::kLanes;
  int column = 0;
  for (; column + kWide <= source.task.columns; column += kWide) {
    run_tile<Unit, kRuns, kRows, Vec::kVectors>(source, column, first_row, tile);
  }
  if constexpr (kWide > 16) {  // blocks have 16 or 32 columns
    for (; column < source.task.columns; column += Vec::kLanes) {
      run_tile<Unit, kRuns, kRows, 1>(source, column, first_row, tile);
    }
  }
}

template <class Unit, int kRows>
void run_rows(int rows, const TileSource<Unit>& source, int first_row, const float* tile) {
  if constexpr (kRows > 1) {
    if (rows != kRows) {
      run_rows<Unit, kRows - 1>(rows, source, first_row, tile);
      return;
    }
  }
  run_columns<Unit, 1, kRows>(source, first_row, tile);
}

// The one tile of a task with few rows.
template <class Unit>
void gemm_few_rows(const BlockTask& task, const Unit& unit, const float* x) {
  int run = 0;
  while (run < task.num_runs) {
    const TileSource<Unit> source{task, unit, nullptr, run};
    if (task.rows == 1 && runs_alike(task, run, Vec::kRunsOfOneRow)) {
      run_columns<Unit, Vec::kRunsOfOneRow, 1>(source, 0, x);
      run += Vec::kRunsOfOneRow;
    } else if (task.rows == 2 && runs_alike(task, run, 2)) {
      run_columns<Unit, 2, 2>(source, 0, x);
      run += 2;
    } else {
      run_rows<Unit, Unit::kTileRows>(task.rows, source, 0, x);
      ++run;
    }
  }
}

template <class Unit>
void gemm_many_rows(const BlockTask& task, const Unit& unit, const float* x) {
  Panel panel;
  for (int run = 0; run < task.num_runs; ++run) {
    if (task.code_bits == 4) {
      unpack<4>(task, task.runs[run], unit, panel);
    } else {
      unpack<8>(task, task.runs[run], unit, panel);
    }
    const TileSource<Unit> source{task, unit, &panel, run};
    int first_row = 0;
    for (int tile = 0; tile < task.tiles.count; ++tile) {
      const int rows = rows_of_tile(task, tile);
      run_rows<Unit, Unit::kTileRows>(rows, source, first_row,
                                      x + first_row * task.packed_rows / Unit::kRowsPerDword);
      first_row += rows;
    }
  }
}

template <class Unit>
void gemm_floats(const BlockTask& task) {
  clear_result(task);
  const Unit unit(task.middle);
  const auto* x = reinterpret_cast<const float*>(task.x);
  if (task.tiles.count == 1) {
    gemm_few_rows(task, unit, x);
  } else {
    gemm_many_rows(task, unit, x);
  }
}

// As Arithmetic::saturate.
template <class Unit>
std::int64_t saturate_floats(std::int64_t rounds) {
  constexpr int kSums = kSaturatingSums;
  F sum[kSums];
  const volatile float value = 1.0F;  // or the compiler adds without multiplying
  const F one = Vec::broadcast(value);
  // Equal sums would be one for the compiler.
  unrolled<kSums>([&]<int i>()
                      __attribute__((always_inline)) { sum[i] = Vec::broadcast(1.0F * i); });
  for (std::int64_t round = 0; round < rounds; ++round) {
    unrolled<kSums>([&]<int i>()
                        __attribute__((always_inline)) { Unit::multiply_add(sum[i], one, one); });
  }
  alignas(64) float total[Vec::kLanes * kSums];
  unrolled<kSums>(
      [&]<int i>() __attribute__((always_inline)) { Vec::store(total + i * Vec::kLanes, sum[i]); });
  __asm__ volatile("" : : "r"(total) : "memory");
  return rounds * kSums * Vec::kLanes * Unit::kRowsPerDword;
}

// A compute type that is float32's product of what `prepare` makes of x.
constexpr Arithmetic float32_arithmetic(float (*prepare)(const PrepareTask&), bool native) {
  return {.native = native,
          .integer = false,
          .tile_rows = Float32Unit::kTileRows,
          .element_bytes = 4,
          .prepare = prepare,
          .gemm = gemm_floats<Float32Unit>,
          .saturate = saturate_floats<Float32Unit>};
}

}  // namespace
}  // namespace marlinq::cpu::MARLINQ_CPU_ISA
