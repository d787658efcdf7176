// What all kernels share: unrolled loops, and a block's scales and zero points as vectors.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/isa_table.hpp"

#define MARLINQ_INLINE [[gnu::always_inline]] inline

namespace marlinq::cpu::MARLINQ_CPU_ISA {
namespace {

using F = Vec::F;
using I = Vec::I;

// Calls f.template operator()<i>() for i = 0 ... kCount - 1, unrolled.
template <int kCount, class Function>
MARLINQ_INLINE void unrolled(const Function& f) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) __attribute__((always_inline)) {
    (f.template operator()<kIndex>(), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

// How far ahead codes are asked for: the memory's latency at the rate of these loops.
constexpr std::int64_t kPrefetch = 4096;

// Chains that hide the latency of any instruction of Arithmetic::saturate, within the registers.
constexpr int kSaturatingSums = Vec::kLanes == 16 ? 24 : 12;

// Scales of kVectors vectors of columns, from element `index` on.
template <int kVectors>
MARLINQ_INLINE void load_scales(const BlockTask& task, std::int64_t index, F (&scale)[kVectors]) {
  switch (task.scale_type) {
    case FloatType::kF16:
      unrolled<kVectors>([&]<int v>() __attribute__((always_inline)) {
        scale[v] = Vec::load_float16(task.scales + 2 * (index + v * Vec::kLanes));
      });
      return;
    case FloatType::kBF16:
      unrolled<kVectors>([&]<int v>() __attribute__((always_inline)) {
        scale[v] = Vec::load_bfloat16(task.scales + 2 * (index + v * Vec::kLanes));
      });
      return;
    case FloatType::kF32:
      break;
  }
  unrolled<kVectors>([&]<int v>() __attribute__((always_inline)) {
    scale[v] = Vec::load_unaligned(task.scales + 4 * (index + v * Vec::kLanes));
  });
}

// Zero points minus the middle.
MARLINQ_INLINE F load_zeros(const BlockTask& task, std::int64_t index) {
  return task.code_bits == 4 ? Vec::load_zero_nibbles(task.zeros + index / 2, task.middle)
                             : Vec::load_zero_bytes(task.zeros + index, task.middle);
}

// The rows of tile `tile`.
MARLINQ_INLINE int rows_of_tile(const BlockTask& task, int tile) {
  return task.tiles.base + (tile < task.tiles.larger ? 1 : 0);
}

// Whether `count` runs from `first` on are there and of one length.
MARLINQ_INLINE bool runs_alike(const BlockTask& task, int first, int count) {
  if (first + count > task.num_runs) return false;
  bool alike = true;
  for (int u = 1; u < count; ++u) {
    alike = alike && task.runs[first + u].count == task.runs[first].count;
  }
  return alike;
}

MARLINQ_INLINE void clear_result(const BlockTask& task) {
  std::memset(task.result, 0, sizeof(float) * kBlockColumns * static_cast<unsigned>(task.rows));
}

}  // namespace
}  // namespace marlinq::cpu::MARLINQ_CPU_ISA
