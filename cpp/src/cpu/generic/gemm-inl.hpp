// The float32 product of one column block, written once for every instruction set. An object
// defines MARLINQ_CPU_ISA and its Vec (isa/<name>/vec.hpp) and includes this; everything has
// internal linkage.
//
// For each run of at most 128 packed rows of one group, and each output:
//   sum    = x[first] * (q - middle) + ... in the order of the packed rows, one chain, float32
//   sum   -= (zero - middle) * (sum of x over the run)         where zero points differ from the
//   middle result = result + scale * sum
// The order does not depend on the number of rows, so a row's result does not depend on its batch.
//
// Few rows dequantise in registers, straight from the codes. From a second tile of rows on, a run
// is unpacked once to a float panel for all tiles: same values, same order, same result.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "core/half.hpp"
#include "cpu/isa_table.hpp"

#define MARLINQ_INLINE [[gnu::always_inline]] inline

namespace marlinq::cpu::MARLINQ_CPU_ISA {
namespace {

using F = Vec::F;
using I = Vec::I;

struct Panel {
  alignas(64) float values[kMaxRowBlock * kBlockColumns];
};

// Calls f.template operator()<i>() for i = 0 ... kCount - 1, unrolled.
template <int kCount, class Function>
MARLINQ_INLINE void unrolled(const Function& f) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) __attribute__((always_inline)) {
    (f.template operator()<kIndex>(), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

// Bit of row kRow inside its column's dword.
template <int kBits, int kRow>
constexpr int kBitOfRow = kBits == 8 ? 8 * kRow : 8 * (kRow % 4) + 4 * (kRow / 4);

// How far ahead codes are asked for: the memory's latency at the rate of this loop.
constexpr std::int64_t kPrefetch = 2048;

// Adds kRuns runs of equal length, from `first_run` on, to a sum each. Side by side they keep the
// multipliers busy where one row has too few chains; every sum is what it is alone.
template <int kBits, int kRuns, int kRows, int kVectors>
MARLINQ_INLINE void accumulate_codes(const BlockTask& task, int first_run,
                                     const Vec::Decoder& decoder, int column, const float* tile,
                                     F (&sum)[kRuns][kRows][kVectors]) {
  constexpr int kStep = 32 / kBits;
  const std::int64_t stride = std::int64_t{4} * task.columns;
  const std::uint8_t* codes[kRuns];
  const float* x[kRuns];
  for (int u = 0; u < kRuns; ++u) {
    const RowBlock& run = task.runs[first_run + u];
    codes[u] = task.codes + run.first / kStep * stride + std::int64_t{4} * column;
    x[u] = tile + std::int64_t{run.first} * kRows;
  }
  for (int row = 0; row < task.runs[first_run].count; row += kStep) {
    I words[kRuns][kVectors];
    for (int u = 0; u < kRuns; ++u) {
      __builtin_prefetch(codes[u] + kPrefetch);
      __builtin_prefetch(codes[u] + kPrefetch + 64);
      for (int v = 0; v < kVectors; ++v) {
        words[u][v] = Vec::load_words(codes[u] + 4 * Vec::kLanes * v);
      }
    }
    unrolled<kStep>([&]<int kRow>() __attribute__((always_inline)) {
      for (int u = 0; u < kRuns; ++u) {
        F weight[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          weight[v] = decoder.template decode<kBits, kBitOfRow<kBits, kRow>>(words[u][v]);
        }
        for (int r = 0; r < kRows; ++r) {
          const F value = Vec::broadcast(x[u][kRow * kRows + r]);
          for (int v = 0; v < kVectors; ++v) {
            sum[u][r][v] = Vec::multiply_add(value, weight[v], sum[u][r][v]);
          }
        }
      }
    });
    for (int u = 0; u < kRuns; ++u) {
      codes[u] += stride;
      x[u] += kStep * kRows;
    }
  }
}

template <int kRows, int kVectors>
MARLINQ_INLINE void accumulate_panel(const RowBlock& run, const Panel& panel, int column,
                                     const float* tile, F (&sum)[kRows][kVectors]) {
  const float* x = tile + std::int64_t{run.first} * kRows;
  const float* weights = panel.values + column;
  for (int row = 0; row < run.count; ++row, weights += kBlockColumns, x += kRows) {
    F weight[kVectors];
    for (int v = 0; v < kVectors; ++v) weight[v] = Vec::load(weights + Vec::kLanes * v);
    for (int r = 0; r < kRows; ++r) {
      const F value = Vec::broadcast(x[r]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec::multiply_add(value, weight[v], sum[r][v]);
    }
  }
}

template <int kBits>
void unpack(const BlockTask& task, const RowBlock& run, const Vec::Decoder& decoder, Panel& panel) {
  constexpr int kStep = 32 / kBits;
  const std::int64_t stride = std::int64_t{4} * task.columns;
  const std::uint8_t* codes = task.codes + run.first / kStep * stride;
  float* weights = panel.values;
  for (int row = 0; row < run.count;
       row += kStep, codes += stride, weights += kStep * kBlockColumns) {
    for (int column = 0; column < task.columns; column += Vec::kLanes) {
      const I words = Vec::load_words(codes + 4 * column);
      unrolled<kStep>([&]<int kRow>() __attribute__((always_inline)) {
        Vec::store(weights + kRow * kBlockColumns + column,
                   decoder.template decode<kBits, kBitOfRow<kBits, kRow>>(words));
      });
    }
  }
}

MARLINQ_INLINE F load_scales(const BlockTask& task, std::int64_t index) {
  switch (task.scale_type) {
    case FloatType::kF16:
      return Vec::load_float16(task.scales + 2 * index);
    case FloatType::kBF16:
      return Vec::load_bfloat16(task.scales + 2 * index);
    case FloatType::kF32:
      break;
  }
  return Vec::load_unaligned(task.scales + 4 * index);
}

// Adds scale * (sum - (zero - middle) * x_sum) of columns [column, column + kVectors * lanes) to
// the result.
template <int kRows, int kVectors>
MARLINQ_INLINE void apply_group(const BlockTask& task, int run, int column, int first_row,
                                const F (&sum)[kRows][kVectors]) {
  const std::int64_t first = std::int64_t{task.runs[run].group} * task.columns + column;
  for (int v = 0; v < kVectors; ++v) {
    const std::int64_t index = first + v * Vec::kLanes;
    const F scale = load_scales(task, index);
    float* result = task.result + first_row * kBlockColumns + column + v * Vec::kLanes;
    if (task.zeros == nullptr) {
      for (int r = 0; r < kRows; ++r) {
        float* place = result + r * kBlockColumns;
        Vec::store(place, Vec::multiply_add(scale, sum[r][v], Vec::load(place)));
      }
      continue;
    }
    const F zero = task.code_bits == 4 ? Vec::load_zero_nibbles(task.zeros + index / 2, task.middle)
                                       : Vec::load_zero_bytes(task.zeros + index, task.middle);
    for (int r = 0; r < kRows; ++r) {
      float* place = result + r * kBlockColumns;
      const F x_sum =
          Vec::broadcast(task.x_sums[std::int64_t{first_row + r} * task.num_runs + run]);
      const F corrected = Vec::negative_multiply_add(zero, x_sum, sum[r][v]);
      Vec::store(place, Vec::multiply_add(scale, corrected, Vec::load(place)));
    }
  }
}

struct TileSource {
  const BlockTask& task;
  const Vec::Decoder& decoder;
  const Panel* panel;  // null: from the codes
  int run;
};

template <int kRuns, int kRows, int kVectors>
[[gnu::noinline]] void run_tile(const TileSource& source, int column, int first_row,
                                const float* tile) {
  const BlockTask& task = source.task;
  F sum[kRuns][kRows][kVectors];
  for (int u = 0; u < kRuns; ++u) {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) sum[u][r][v] = Vec::zero();
    }
  }
  if (source.panel != nullptr) {
    accumulate_panel<kRows, kVectors>(task.runs[source.run], *source.panel, column, tile, sum[0]);
  } else if (task.code_bits == 4) {
    accumulate_codes<4>(task, source.run, source.decoder, column, tile, sum);
  } else {
    accumulate_codes<8>(task, source.run, source.decoder, column, tile, sum);
  }
  for (int u = 0; u < kRuns; ++u) {
    apply_group<kRows, kVectors>(task, source.run + u, column, first_row, sum[u]);
  }
}

template <int kRuns, int kRows>
void run_columns(const TileSource& source, int first_row, const float* tile) {
  constexpr int kWide = Vec::kVectors * Vec::kLanes;
  int column = 0;
  for (; column + kWide <= source.task.columns; column += kWide) {
    run_tile<kRuns, kRows, Vec::kVectors>(source, column, first_row, tile);
  }
  if constexpr (kWide > 16) {  // blocks have 16 or 32 columns
    for (; column < source.task.columns; column += Vec::kLanes) {
      run_tile<kRuns, kRows, 1>(source, column, first_row, tile);
    }
  }
}

template <int kRows>
void run_rows(int rows, const TileSource& source, int first_row, const float* tile) {
  if constexpr (kRows > 1) {
    if (rows != kRows) {
      run_rows<kRows - 1>(rows, source, first_row, tile);
      return;
    }
  }
  run_columns<1, kRows>(source, first_row, tile);
}

// Up to this many rows, two runs at a time.
constexpr int kPairedRows = 2;

// The one tile of a task with few rows.
void gemm_few_rows(const BlockTask& task, const Vec::Decoder& decoder) {
  int run = 0;
  while (run < task.num_runs) {
    const TileSource source{task, decoder, nullptr, run};
    const bool pair = task.rows <= kPairedRows && run + 1 < task.num_runs &&
                      task.runs[run].count == task.runs[run + 1].count;
    if (pair && task.rows == 1) {
      run_columns<2, 1>(source, 0, task.x);
    } else if (pair) {
      run_columns<2, 2>(source, 0, task.x);
    } else {
      run_rows<Vec::kTileRows>(task.rows, source, 0, task.x);
    }
    run += pair ? 2 : 1;
  }
}

void gemm_many_rows(const BlockTask& task, const Vec::Decoder& decoder) {
  Panel panel;
  for (int run = 0; run < task.num_runs; ++run) {
    if (task.code_bits == 4) {
      unpack<4>(task, task.runs[run], decoder, panel);
    } else {
      unpack<8>(task, task.runs[run], decoder, panel);
    }
    const TileSource source{task, decoder, &panel, run};
    int first_row = 0;
    for (int tile = 0; tile < task.tiles.count; ++tile) {
      const int rows = task.tiles.base + (tile < task.tiles.larger ? 1 : 0);
      run_rows<Vec::kTileRows>(rows, source, first_row, task.x + first_row * task.packed_rows);
      first_row += rows;
    }
  }
}

void gemm_float32(const BlockTask& task) {
  const auto rows = static_cast<unsigned>(task.rows);
  std::memset(task.result, 0, sizeof(float) * kBlockColumns * rows);
  const Vec::Decoder decoder(task.middle);
  if (task.tiles.count == 1) {
    gemm_few_rows(task, decoder);
  } else {
    gemm_many_rows(task, decoder);
  }
}

void to_float(FloatType type, const std::uint8_t* source, float* target, std::int64_t count) {
  if (type == FloatType::kF32) {
    std::memcpy(target, source, static_cast<std::size_t>(count) * 4);
    return;
  }
  std::int64_t i = 0;
  if (type == FloatType::kF16) {
    for (; i + Vec::kLanes <= count; i += Vec::kLanes)
      Vec::store_unaligned(target + i, Vec::load_float16(source + 2 * i));
  }
  for (; i < count; ++i) {
    std::uint16_t bits;
    std::memcpy(&bits, source + 2 * i, sizeof bits);
    target[i] = type == FloatType::kF16 ? float16_to_float(bits) : bfloat16_to_float(bits);
  }
}

void from_float(FloatType type, const float* source, std::uint8_t* target, std::int64_t count) {
  if (type == FloatType::kF32) {
    std::memcpy(target, source, static_cast<std::size_t>(count) * 4);
    return;
  }
  std::int64_t i = 0;
  if (type == FloatType::kF16) {
    for (; i + Vec::kLanes <= count; i += Vec::kLanes)
      Vec::store_float16(target + 2 * i, Vec::load_unaligned(source + i));
  }
  for (; i < count; ++i) {
    const std::uint16_t bits =
        type == FloatType::kF16 ? float_to_float16(source[i]) : float_to_bfloat16(source[i]);
    std::memcpy(target + 2 * i, &bits, sizeof bits);
  }
}

}  // namespace
}  // namespace marlinq::cpu::MARLINQ_CPU_ISA
