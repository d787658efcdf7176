// Rows of x to the forms in which kernels read them. Plain loops, which the compiler makes vectors
// of; everything has internal linkage.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/half.hpp"
#include "cpu/generic/block-inl.hpp"

namespace marlinq::cpu::MARLINQ_CPU_ISA {
namespace {

MARLINQ_INLINE int packed_rows_of(const PrepareTask& task) {
  const RowBlock& last = task.runs[task.num_runs - 1];
  return last.first + last.count - task.runs[0].first;
}

// Integers that stand for up to kMaxRowBlock values.
struct Quantised {
  alignas(64) std::int32_t value[kMaxRowBlock];
  float scale;  // NaN where a value is not finite
};

// To the nearest of 2 * limit + 1 steps up to the largest magnitude.
MARLINQ_INLINE void quantise(const float* values, int count, float limit, Quantised& result) {
  std::int32_t largest = 0;  // non-negative floats order as their bits do
  for (int i = 0; i < count; ++i) {
    std::int32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    bits &= 0x7FFFFFFF;
    largest = bits > largest ? bits : largest;
  }
  const float magnitude = __builtin_bit_cast(float, largest);
  constexpr std::int32_t kInfinity = 0x7F800000;
  // Whose inverse would overflow. Rows of such values alone come scaled up (gemm.cpp), and beside
  // larger ones they vanish.
  constexpr float kNothing = 0x1p-90F;
  if (largest >= kInfinity || magnitude < kNothing) {
    std::memset(result.value, 0, sizeof result.value);
    result.scale = largest >= kInfinity ? __builtin_nanf("") : 0.0F;
    return;
  }
  const float inverse = limit / magnitude;
  result.scale = magnitude / limit;
  // Adding 1.5 * 2^23 rounds to nearest and leaves the integer in the low bits.
  constexpr float kRound = 0x1.8p23F;
  constexpr std::int32_t kRoundBits = 0x4B400000;
  for (int i = 0; i < count; ++i) {
    const float rounded = values[i] * inverse + kRound;
    std::int32_t bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    result.value[i] = bits - kRoundBits;
  }
}

// Half a step is below max|x| / 65000 (contract of int16), and hi = (i + 128) >> 8 fits 8 bits.
constexpr float kInt16Limit = 32600.0F;
constexpr float kInt8Limit = 127.0F;

// [packed row / 4][row of the tile][half] dwords of four consecutive packed rows.
template <int kHalves>
void prepare_integers(const PrepareTask& task) {
  Quantised q;
  const int count = packed_rows_of(task);
  const int first = task.runs[0].first;
  quantise(task.values, count, kHalves == 2 ? kInt16Limit : kInt8Limit, q);
  for (int i = 0; i < task.num_runs; ++i) {
    const RowBlock& run = task.runs[i];
    std::int32_t sum = 0;
    for (int p = run.first - first; p < run.first - first + run.count; ++p) sum += q.value[p];
    task.run_inputs[i * task.tile_rows + task.row] = {
        .scale = q.scale, .start = -task.middle * sum, .sum = static_cast<float>(sum)};
  }
  alignas(64) std::int8_t high[kMaxRowBlock];
  alignas(64) std::int8_t low[kMaxRowBlock];
  if constexpr (kHalves == 2) {
    for (int p = 0; p < kMaxRowBlock; ++p) {
      const std::int32_t upper = (q.value[p] + 128) >> 8;
      high[p] = static_cast<std::int8_t>(upper);
      low[p] = static_cast<std::int8_t>(q.value[p] - upper * 256);
    }
  } else {
    for (int p = 0; p < kMaxRowBlock; ++p) low[p] = static_cast<std::int8_t>(q.value[p]);
  }
  constexpr int kQuad = 4 * kHalves;
  const std::int64_t stride = std::int64_t{kQuad} * task.tile_rows;
  std::uint8_t* place = task.x + first / 4 * stride + task.row * kQuad;
  for (int p = 0; p < count; p += 4, place += stride) {
    if constexpr (kHalves == 2) {
      std::memcpy(place, high + p, 4);
      std::memcpy(place + 4, low + p, 4);
    } else {
      std::memcpy(place, low + p, 4);
    }
  }
}

// The sums of each run; eight chains, added in pairs: fast, and less rounding than one chain.
MARLINQ_INLINE void sum_runs(const PrepareTask& task, const float* values) {
  if (task.run_inputs == nullptr) return;
  for (int i = 0; i < task.num_runs; ++i) {
    const RowBlock& run = task.runs[i];
    const float* of_run = values + (run.first - task.runs[0].first);
    float part[8] = {};
    for (int p = 0; p < run.count; p += 8) {
      for (int j = 0; j < 8; ++j) part[j] += of_run[p + j];
    }
    task.run_inputs[i * task.tile_rows + task.row] = {
        .scale = 1.0F,
        .start = 0,
        .sum = ((part[0] + part[1]) + (part[2] + part[3])) +
               ((part[4] + part[5]) + (part[6] + part[7]))};
  }
}

// [packed row][row of the tile] float32.
MARLINQ_INLINE void store_floats(const PrepareTask& task, const float* values) {
  const int count = packed_rows_of(task);
  float* place = reinterpret_cast<float*>(task.x) +
                 std::int64_t{task.runs[0].first} * task.tile_rows + task.row;
  for (int p = 0; p < count; ++p, place += task.tile_rows) *place = values[p];
  sum_runs(task, values);
}

void prepare_float32(const PrepareTask& task) { store_floats(task, task.values); }

// What int16 and int8 make of x, as floats: for instruction sets without the unit. Integers and
// their products with codes are exact in float32, so only the order of the sums differs.
template <int kHalves>
void prepare_integers_as_floats(const PrepareTask& task) {
  Quantised q;
  const int count = packed_rows_of(task);
  quantise(task.values, count, kHalves == 2 ? kInt16Limit : kInt8Limit, q);
  float values[kMaxRowBlock];
  for (int p = 0; p < count; ++p) values[p] = static_cast<float>(q.value[p]) * q.scale;
  store_floats(task, values);
}

// Rows of pair `pair` of the dword of codes that has packed rows [8i, 8i + 8), or [4i, 4i + 4).
constexpr int first_row_of_pair(int code_bits, int pair) {
  constexpr int kRows[4] = {0, 4, 1, 5};
  return code_bits == 4 ? kRows[pair] : pair;
}

// [packed row / 2][row of the tile] dwords of the two packed rows whose codes a kernel finds 16 bits
// apart; or, where no unit multiplies pairs, float32 of the same values.
template <bool kInPairs>
void prepare_bfloat16(const PrepareTask& task) {
  const int count = packed_rows_of(task);
  std::uint16_t bits[kMaxRowBlock];
  float values[kMaxRowBlock];
  for (int p = 0; p < count; ++p) {
    bits[p] = float_to_bfloat16(task.values[p]);
    values[p] = bfloat16_to_float(bits[p]);
  }
  if constexpr (!kInPairs) {
    store_floats(task, values);
    return;
  }
  const int step = 32 / task.code_bits;
  const std::int64_t stride = std::int64_t{4} * task.tile_rows;
  std::uint8_t* place = task.x + task.runs[0].first / 2 * stride + task.row * 4;
  for (int p = 0; p < count; p += step) {
    for (int pair = 0; pair < step / 2; ++pair, place += stride) {
      const int row = p + first_row_of_pair(task.code_bits, pair);
      std::memcpy(place, bits + row, 2);
      std::memcpy(place + 2, bits + row + 2, 2);
    }
  }
  sum_runs(task, values);
}

}  // namespace
}  // namespace marlinq::cpu::MARLINQ_CPU_ISA
