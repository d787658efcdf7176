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

// The bits of the largest magnitude of those below `limit`; non-negative floats order as their bits.
MARLINQ_INLINE std::int32_t largest_below(const float* values, std::int32_t limit) {
  std::int32_t largest = 0;
  for (int i = 0; i < kMaxRowBlock; ++i) {
    std::int32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    bits &= 0x7FFFFFFF;
    bits = bits < limit ? bits : 0;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

constexpr std::int32_t kInfinity = 0x7F800000;

MARLINQ_INLINE float largest_finite(const float* values) {
  return __builtin_bit_cast(float, largest_below(values, kInfinity));
}

// Integers that stand for kMaxRowBlock values.
struct Quantised {
  alignas(64) std::int32_t value[kMaxRowBlock];
  float scale;    // NaN where a value is not finite
  float largest;  // of the finite magnitudes
};

// To the nearest of 2 * limit + 1 steps up to the largest magnitude.
MARLINQ_INLINE void quantise(const float* values, float limit, Quantised& result) {
  const std::int32_t bits_of_largest = largest_below(values, 0x7FFFFFFF);
  const bool finite = bits_of_largest < kInfinity;
  const float largest =
      finite ? __builtin_bit_cast(float, bits_of_largest) : largest_finite(values);
  result.largest = largest;
  // Whose inverse would overflow. Rows of such values alone come scaled up (gemm.cpp), and beside
  // larger ones they vanish.
  constexpr float kNothing = 0x1p-90F;
  if (!finite || largest < kNothing) {
    std::memset(result.value, 0, sizeof result.value);
    result.scale = finite ? 0.0F : __builtin_nanf("");
    return;
  }
  const float inverse = limit / largest;
  result.scale = largest / limit;
  // Adding 1.5 * 2^23 rounds to nearest and leaves the integer in the low bits.
  constexpr float kRound = 0x1.8p23F;
  constexpr std::int32_t kRoundBits = 0x4B400000;
  for (int i = 0; i < kMaxRowBlock; ++i) {
    const float rounded = values[i] * inverse + kRound;
    std::int32_t bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    result.value[i] = bits - kRoundBits;
  }
}

// Half a step is below max|x| / 65000 (contract of int16), and hi = (i + 128) >> 8 fits 8 bits.
constexpr float kInt16Limit = 32600.0F;
constexpr float kInt8Limit = 127.0F;

MARLINQ_INLINE void store_run_inputs(const PrepareTask& task, const Quantised& q) {
  for (int i = 0; i < task.num_runs; ++i) {
    const RowBlock& run = task.runs[i];
    const std::int32_t* of_run = q.value + (run.first - task.runs[0].first);
    std::int32_t sum = 0;
    for (int p = 0; p < run.count; ++p) sum += of_run[p];
    task.run_inputs[i * task.tile_rows + task.row] = {
        .scale = q.scale, .start = -task.middle * sum, .sum = static_cast<float>(sum)};
  }
}

// [packed row / 4][row of the tile][half] dwords of four consecutive packed rows.
template <int kHalves>
float prepare_integers(const PrepareTask& task) {
  Quantised q;
  const int first = task.runs[0].first;
  quantise(task.values, kHalves == 2 ? kInt16Limit : kInt8Limit, q);
  store_run_inputs(task, q);
  alignas(64) std::uint8_t bytes[kHalves][kMaxRowBlock];
  for (int p = 0; p < kMaxRowBlock; ++p) {
    const std::int32_t upper = (q.value[p] + 128) >> 8;
    bytes[0][p] = static_cast<std::uint8_t>(kHalves == 2 ? upper : q.value[p]);
    if constexpr (kHalves == 2) bytes[1][p] = static_cast<std::uint8_t>(q.value[p]);
  }
  constexpr int kQuads = kMaxRowBlock / 4;
  alignas(64) std::uint32_t quads[kQuads][kHalves];
  for (int h = 0; h < kHalves; ++h) {
    std::uint32_t half[kQuads];
    std::memcpy(half, bytes[h], sizeof half);
    for (int i = 0; i < kQuads; ++i) quads[i][h] = half[i];
  }
  constexpr int kBytes = 4 * kHalves;
  const std::int64_t stride = std::int64_t{kBytes} * task.tile_rows;
  std::uint8_t* place = task.x + first / 4 * stride + task.row * kBytes;
  const int count = packed_rows_of(task) / 4;
  if (task.tile_rows == 1) {
    std::memcpy(place, quads, static_cast<std::size_t>(count) * kBytes);
    return q.largest;
  }
  for (int i = 0; i < count; ++i, place += stride) std::memcpy(place, quads[i], kBytes);
  return q.largest;
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

float prepare_float32(const PrepareTask& task) {
  store_floats(task, task.values);
  return largest_finite(task.values);
}

// What int16 and int8 make of x, as floats: for instruction sets without the unit. Integers and
// their products with codes are exact in float32, so only the order of the sums differs.
template <int kHalves>
float prepare_integers_as_floats(const PrepareTask& task) {
  Quantised q;
  quantise(task.values, kHalves == 2 ? kInt16Limit : kInt8Limit, q);
  float values[kMaxRowBlock];
  for (int p = 0; p < kMaxRowBlock; ++p) values[p] = static_cast<float>(q.value[p]) * q.scale;
  store_floats(task, values);
  return q.largest;
}

// Rows of pair `pair` of the dword of codes that has packed rows [8i, 8i + 8), or [4i, 4i + 4).
constexpr int first_row_of_pair(int code_bits, int pair) {
  constexpr int kRows[4] = {0, 4, 1, 5};
  return code_bits == 4 ? kRows[pair] : pair;
}

// [packed row / 2][row of the tile] dwords of the two packed rows whose codes a kernel finds 16 bits apart.
MARLINQ_INLINE void store_pairs(const PrepareTask& task, const std::uint16_t* values) {
  const int count = packed_rows_of(task);
  const int step = 32 / task.code_bits;
  const std::int64_t stride = std::int64_t{4} * task.tile_rows;
  std::uint8_t* place = task.x + task.runs[0].first / 2 * stride + task.row * 4;
  for (int p = 0; p < count; p += step) {
    for (int pair = 0; pair < step / 2; ++pair, place += stride) {
      const int row = p + first_row_of_pair(task.code_bits, pair);
      std::memcpy(place, values + row, 2);
      std::memcpy(place + 2, values + row + 2, 2);
    }
  }
}

// In pairs; or, where no unit multiplies them, float32 of the same values.
template <bool kInPairs>
float prepare_bfloat16(const PrepareTask& task) {
  std::uint16_t bits[kMaxRowBlock];
  float values[kMaxRowBlock];
  for (int p = 0; p < kMaxRowBlock; ++p) {
    bits[p] = float_to_bfloat16(task.values[p]);
    values[p] = bfloat16_to_float(bits[p]);
  }
  const float largest = largest_finite(task.values);
  if constexpr (!kInPairs) {
    store_floats(task, values);
    return largest;
  }
  store_pairs(task, bits);
  sum_runs(task, values);
  return largest;
}

}  // namespace
}  // namespace marlinq::cpu::MARLINQ_CPU_ISA
