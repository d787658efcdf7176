// The product of one column block with x held as integers: int16 in two halves of 8 bits, or int8.
// An object defines MARLINQ_CPU_ISA and its Vec, which has `dot` (or `dot_narrow` and `widen`) on top
// of what float kernels ask of it, and includes this; everything has internal linkage.
//
// For each run and each output, with x about `scale` times the integers i (prepare-inl.hpp):
//   sum     = (q - middle) * i + ... over the run, exact in 32 bits: at most 128 * 32600 * 128
//   sum    -= (zero - middle) * (sum of i), in float32             where zero points differ
//   result += sum * (scale of the weight * scale of x), float32
// Where several runs share a scale of x, and registers hold them, their sums are added up before that scale is applied.
// Sums of integers have no order, and the runs come one after the other, so a row's result does
// not depend on its batch. The middle enters as the value that an accumulator starts with.
//
// Codes are unpacked in registers for every tile of rows: on the processors at hand shifts and
// masks run beside the dot products, and a panel of unpacked codes would cost loads and stores.
#pragma once

#include <cstdint>

#include "cpu/generic/block-inl.hpp"
#include "cpu/generic/prepare-inl.hpp"

namespace marlinq::cpu::MARLINQ_CPU_ISA {
namespace {

// x of a tile: [packed row / 4][row of the tile][half] of 4 bytes, the high half first.
template <int kHalves>
constexpr int kQuadBytes = 4 * kHalves;

// A tile of rows of a task.
struct IntegerTile {
  const BlockTask& task;
  int index;
  const std::uint8_t* x;
  const RunInput* inputs;  // [run][row]
  float* result;           // [row][32]
};

// A task's only tile prefetches the codes that follow its own at a short distance. Where there are
// several, the first two prefetch a half each of the next block, so that memory is read while all of
// them multiply; the others find nothing left to do.
constexpr int kSharesOfNextBlock = 2;

MARLINQ_INLINE const std::uint8_t* share_of_next_block(const IntegerTile& tile, int column) {
  const BlockTask& task = tile.task;
  const std::int64_t bytes = task.packed_rows * task.columns * task.code_bits / 8;
  const int share = tile.index % kSharesOfNextBlock;
  return task.codes + bytes +
         bytes * (share * task.columns + column) / (kSharesOfNextBlock * task.columns);
}

// How far ahead a task's only tile prefetches: several rows are bound neither by memory nor by arithmetic
// alone, and fast memory keeps up with them only from further away.
template <int kHalves, int kRows>
constexpr std::int64_t kPrefetchOfTile = kRows * kHalves >= 4 ? 4 * kPrefetch : kPrefetch;

// Chains of additions of one sum. For few rows each 4 packed rows of a dword have their own, so that
// latency does not bound the rate; the second chain takes its codes where they lie, times 16. One row is
// bound by loads, so words are loaded once for both.
template <int kBits, int kHalves, int kRows>
constexpr int kChains = kBits == 4 && kRows * kHalves <= Vec::kChainedSums ? 2 : 1;

template <int kRows, int kVectors, int kHalves, int kChains>
using IntegerSums = I[kRows][kVectors][kHalves][kChains];

// Where a tile reads on: runs lie one after the other.
struct TilePlace {
  const std::uint8_t* codes;
  const std::uint8_t* x;
  const std::uint8_t* ahead;  // what to prefetch next, where a task has several tiles
  std::int64_t stride;        // bytes of codes from a dword of a column to its next
};

// One dword of codes a column: calls add.template operator()<row, vector, half, quad>(codes, x) for
// each product of four codes with four integers. Then goes to the next.
template <bool kAlone, int kBits, int kRows, int kVectors, int kHalves, int kChains, class Add>
MARLINQ_INLINE void step(TilePlace& place, const Add& add) {
  const std::uint8_t* codes = place.codes;
  const std::uint8_t* x = place.x;
  I words[kVectors];
  unrolled<kVectors>([&]<int v>() __attribute__((always_inline)) {
    words[v] = Vec::load_words(codes + 4 * Vec::kLanes * v);
    if constexpr (kChains == 2 && kRows * kHalves <= 2) Vec::keep_in_register(words[v]);
    if constexpr (kAlone && v * Vec::kLanes % 16 == 0) {
      __builtin_prefetch(codes + kPrefetchOfTile<kHalves, kRows> + 4 * Vec::kLanes * v);
    }
  });
  if constexpr (!kAlone) {
    __builtin_prefetch(place.ahead);
    place.ahead += 4 * Vec::kLanes * kVectors / kSharesOfNextBlock;
  }
  unrolled<8 / kBits>([&]<int quad>() __attribute__((always_inline)) {
    I weight[kVectors];
    unrolled<kVectors>([&]<int v>() __attribute__((always_inline)) {
      if constexpr (kBits == 8) {
        weight[v] = words[v];
      } else if constexpr (quad == 0) {
        weight[v] = Vec::low_nibbles(words[v]);
      } else if constexpr (kChains == 2) {
        weight[v] = Vec::high_nibbles_in_place(words[v]);
      } else {
        weight[v] = Vec::high_nibbles(words[v]);
      }
    });
    unrolled<kRows>([&]<int r>() __attribute__((always_inline)) {
      unrolled<kHalves>([&]<int h>() __attribute__((always_inline)) {
        constexpr int kPlace = (quad * kRows + r) * kQuadBytes<kHalves> + 4 * h;
        const I value = Vec::broadcast_word(x + kPlace);
        unrolled<kVectors>([&]<int v>() __attribute__((always_inline)) {
          add.template operator()<r, v, h, quad>(weight[v], value);
        });
      });
    });
  });
  place.codes += place.stride;
  place.x += 8 / kBits * kRows * kQuadBytes<kHalves>;
}

// Vec::dot adds to 32 bits. Without it, 4-bit codes add up in 16 bits for a while (Vec::dot_narrow).
template <class V>
concept HasDot = requires(I& sum, I codes) { V::template dot<4>(sum, codes, codes); };

// Adds a run of `count` packed rows, and goes to its end.
template <class V, bool kAlone, int kBits, int kRows, int kVectors, int kHalves, int kChains>
MARLINQ_INLINE void accumulate(TilePlace& place, int count,
                               IntegerSums<kRows, kVectors, kHalves, kChains>& sum) {
  constexpr int kStep = 32 / kBits;
  TilePlace next = place;  // in registers
  if constexpr (kBits == 8 || HasDot<V>) {
    for (int row = 0; row < count; row += kStep) {
      step<kAlone, kBits, kRows, kVectors, kHalves, kChains>(
          next,
          [&]<int r, int v, int h, int quad>(I weight, I value) __attribute__((always_inline)) {
            V::template dot<kBits>(sum[r][v][h][quad % kChains], weight, value);
          });
    }
  } else {
    for (int row = 0; row < count;) {
      const int end = row + V::kNarrowRows < count ? row + V::kNarrowRows : count;
      I narrow[kRows][kVectors][kHalves];
      unrolled<kRows * kVectors * kHalves>([&]<int i>() __attribute__((always_inline)) {
        narrow[i / kHalves / kVectors][i / kHalves % kVectors][i % kHalves] = Vec::zero_words();
      });
      for (; row < end; row += kStep) {
        step<kAlone, kBits, kRows, kVectors, kHalves, kChains>(
            next,
            [&]<int r, int v, int h, int quad>(I weight, I value)
                __attribute__((always_inline)) { V::dot_narrow(narrow[r][v][h], weight, value); });
      }
      unrolled<kRows * kVectors * kHalves>([&]<int i>() __attribute__((always_inline)) {
        constexpr int r = i / kHalves / kVectors;
        constexpr int v = i / kHalves % kVectors;
        constexpr int h = i % kHalves;
        sum[r][v][h][0] = Vec::add_words(sum[r][v][h][0], V::widen(narrow[r][v][h]));
      });
    }
  }
  place = next;
}

template <int kChains>
MARLINQ_INLINE I add_chains(const I (&sum)[kChains]) {
  return kChains == 2 ? Vec::add_words(sum[0], Vec::shift_right_4(sum[kChains - 1])) : sum[0];
}

template <int kHalves, int kChains>
MARLINQ_INLINE I add_halves(const I (&sum)[kHalves][kChains]) {
  const I words = add_chains(sum[kHalves - 1]);
  if constexpr (kHalves == 1) return words;
  return Vec::add_words(Vec::shift_left_8(add_chains(sum[0])), words);
}

template <bool kZeros, int kRows, int kVectors, int kHalves, int kChains, class End>
MARLINQ_INLINE void end_run_of(const BlockTask& task, const RunInput* inputs, std::int64_t first,
                               const IntegerSums<kRows, kVectors, kHalves, kChains>& sum,
                               const End& end) {
  F scale[kVectors];
  load_scales(task, first, scale);
  unrolled<kVectors>([&]<int v>() __attribute__((always_inline)) {
    F total[kRows];
    unrolled<kRows>([&]<int r>() __attribute__((always_inline)) {
      total[r] = Vec::to_float(add_halves(sum[r][v]));
    });
    if constexpr (kZeros) {
      const F zero = load_zeros(task, first + v * Vec::kLanes);
      unrolled<kRows>([&]<int r>() __attribute__((always_inline)) {
        total[r] = Vec::negative_multiply_add(zero, Vec::broadcast(inputs[r].sum), total[r]);
      });
    }
    unrolled<kRows>([&]<int r>() __attribute__((always_inline)) {
      end.template operator()<r, v>(total[r], scale[v]);
    });
  });
}

// Calls end.template operator()<row, vector>(sum, scale of the weight) for each sum of a run, less zero points.
template <int kRows, int kVectors, int kHalves, int kChains, class End>
MARLINQ_INLINE void end_run(const BlockTask& task, const RunInput* inputs, std::int64_t first,
                            const IntegerSums<kRows, kVectors, kHalves, kChains>& sum,
                            const End& end) {
  if (task.zeros == nullptr) {
    end_run_of<false, kRows, kVectors, kHalves, kChains>(task, inputs, first, sum, end);
  } else {
    end_run_of<true, kRows, kVectors, kHalves, kChains>(task, inputs, first, sum, end);
  }
}

// A sum of a run, by the scales of the weight and of x.
MARLINQ_INLINE void add_to_result(float* result, F total, F scale, float x_scale) {
  const F factor = Vec::multiply(scale, Vec::broadcast(x_scale));
  Vec::store(result, Vec::multiply_add(total, factor, Vec::load(result)));
}

template <int kRows, int kVectors, int kHalves, int kChains>
MARLINQ_INLINE void start_sums(const RunInput* inputs,
                               IntegerSums<kRows, kVectors, kHalves, kChains>& sum) {
  unrolled<kRows>([&]<int r>() __attribute__((always_inline)) {
    const I start = Vec::broadcast_word(&inputs[r].start);
    unrolled<kVectors>([&]<int v>() __attribute__((always_inline)) {
      unrolled<kHalves * kChains>([&]<int i>() __attribute__((always_inline)) {
        sum[r][v][i / kChains][i % kChains] = Vec::zero_words();
      });
      sum[r][v][kHalves - 1][0] = start;
    });
  });
}

template <bool kAlone, int kBits, int kHalves, int kRows, int kVectors>
[[gnu::noinline]] void integer_tile(const IntegerTile& tile, int column) {
  constexpr int kOwnChains = kChains<kBits, kHalves, kRows>;
  const BlockTask task = tile.task;
  const RunInput* inputs = tile.inputs;
  float* result = tile.result + column;
  TilePlace place{.codes = task.codes + std::int64_t{4} * column,
                  .x = tile.x,
                  .ahead = share_of_next_block(tile, column),
                  .stride = std::int64_t{4} * task.columns};
  for (int run = 0; run < task.num_runs; ++run, inputs += kRows) {
    // GCC keeps results in registers; where they do not fit beside the sums, they have to stay in memory.
    constexpr int kSums = kRows * kVectors * kHalves * (HasDot<Vec> ? kOwnChains : 2);
    if constexpr (kSums + (kRows + 1) * kVectors + 3 > Vec::kRegisters) __asm__("" : "+r"(result));
    IntegerSums<kRows, kVectors, kHalves, kOwnChains> sum;
    start_sums<kRows, kVectors, kHalves, kOwnChains>(inputs, sum);
    accumulate<Vec, kAlone, kBits, kRows, kVectors, kHalves, kOwnChains>(place,
                                                                         task.runs[run].count, sum);
    const std::int64_t first = std::int64_t{task.runs[run].group} * task.columns + column;
    end_run<kRows, kVectors, kHalves, kOwnChains>(
        task, inputs, first, sum,
        [&]<int r, int v>(F total, F scale) __attribute__((always_inline)) {
          add_to_result(result + r * kBlockColumns + v * Vec::kLanes, total, scale,
                        inputs[r].scale);
        });
  }
}

// Sums of several runs fit into registers beside those of a run. So it is for any number of rows, whose
// results must not depend on it.
template <int kBits, int kHalves>
constexpr bool kSharesScales = (kHalves == 1 || kBits == 4) && HasDot<Vec> && Vec::kRegisters == 32;

// Runs of which several share a scale of x.
template <bool kAlone, int kBits, int kHalves, int kRows, int kVectors>
[[gnu::noinline]] void tile_of_shared_scales(const IntegerTile& tile, int column) {
  // Of sums and parts as many as registers hold.
  constexpr bool kRoom = kRows * kVectors * (2 * kHalves + 1) < 20;
  constexpr int kOwnChains = kRoom ? kChains<kBits, kHalves, kRows> : 1;
  const BlockTask task = tile.task;
  const RunInput* inputs = tile.inputs;
  float* result = tile.result + column;
  TilePlace place{.codes = task.codes + std::int64_t{4} * column,
                  .x = tile.x,
                  .ahead = share_of_next_block(tile, column),
                  .stride = std::int64_t{4} * task.columns};
  int last = -1;  // run of those that share the scale
  F part[kRows][kVectors];
  for (int run = 0; run < task.num_runs; ++run, inputs += kRows) {
    if (run > last) {
      last = run + runs_of_one_scale(task.runs + run, task.num_runs - run) - 1;
      unrolled<kRows * kVectors>([&]<int i>() __attribute__((always_inline)) {
        part[i / kVectors][i % kVectors] = Vec::zero();
      });
    }
    IntegerSums<kRows, kVectors, kHalves, kOwnChains> sum;
    start_sums<kRows, kVectors, kHalves, kOwnChains>(inputs, sum);
    accumulate<Vec, kAlone, kBits, kRows, kVectors, kHalves, kOwnChains>(place,
                                                                         task.runs[run].count, sum);
    const std::int64_t first = std::int64_t{task.runs[run].group} * task.columns + column;
    end_run<kRows, kVectors, kHalves, kOwnChains>(
        task, inputs, first, sum,
        [&]<int r, int v>(F total, F scale) __attribute__((always_inline)) {
          part[r][v] = Vec::multiply_add(total, scale, part[r][v]);
        });
    if (run < last) continue;
    unrolled<kRows>([&]<int r>() __attribute__((always_inline)) {
      const F factor = Vec::broadcast(inputs[r].scale);
      unrolled<kVectors>([&]<int v>() __attribute__((always_inline)) {
        float* to = result + r * kBlockColumns + v * Vec::kLanes;
        Vec::store(to, Vec::multiply_add(part[r][v], factor, Vec::load(to)));
      });
    });
  }
}

template <bool kAlone, int kHalves, int kRows, int kVectors>
MARLINQ_INLINE void integer_tile(const IntegerTile& tile, int column) {
  // Sums in units of other scales, without that of x, may leave the range of float32.
  if (tile.task.scale_type == FloatType::kF16 &&
      runs_of_one_scale(tile.task.runs, tile.task.num_runs) > 1) {
    if constexpr (kSharesScales<4, kHalves>) {
      if (tile.task.code_bits == 4) {
        tile_of_shared_scales<kAlone, 4, kHalves, kRows, kVectors>(tile, column);
        return;
      }
    }
    if constexpr (kSharesScales<8, kHalves>) {
      if (tile.task.code_bits == 8) {
        tile_of_shared_scales<kAlone, 8, kHalves, kRows, kVectors>(tile, column);
        return;
      }
    }
  }
  if (tile.task.code_bits == 4) {
    integer_tile<kAlone, 4, kHalves, kRows, kVectors>(tile, column);
  } else {
    integer_tile<kAlone, 8, kHalves, kRows, kVectors>(tile, column);
  }
}

template <bool kAlone, int kHalves, int kRows>
void integer_columns(const IntegerTile& tile) {
  // Two vectors of columns share a broadcast of x, where there are registers for their sums.
  constexpr int kVectors = 2 * kRows * kHalves <= Vec::kIntegerSums ? 2 : 1;
  constexpr int kWide = kVectors * Vec::kLanes;
  int column = 0;
  for (; column + kWide <= tile.task.columns; column += kWide) {
    integer_tile<kAlone, kHalves, kRows, kVectors>(tile, column);
  }
  if constexpr (kWide > 16) {  // blocks have 16 or 32 columns
    for (; column < tile.task.columns; column += Vec::kLanes) {
      integer_tile<kAlone, kHalves, kRows, 1>(tile, column);
    }
  }
}

template <int kHalves, int kRows>
void integer_rows(int rows, const IntegerTile& tile) {
  if constexpr (kRows > 1) {
    if (rows != kRows) {
      integer_rows<kHalves, kRows - 1>(rows, tile);
      return;
    }
  }
  if (tile.task.tiles.count == 1) {
    integer_columns<true, kHalves, kRows>(tile);
  } else {
    integer_columns<false, kHalves, kRows>(tile);
  }
}

// Tile after tile, each through all runs: one stream of codes, which later tiles find in the second
// level of cache.
template <int kHalves, int kMostRows>
void gemm_integer(const BlockTask& task) {
  clear_result(task);
  std::int64_t first_row = 0;
  for (int tile = 0; tile < task.tiles.count; ++tile) {
    const int rows = rows_of_tile(task, tile);
    integer_rows<kHalves, kMostRows>(rows, {.task = task,
                                            .index = tile,
                                            .x = task.x + first_row * task.packed_rows * kHalves,
                                            .inputs = task.run_inputs + first_row * task.num_runs,
                                            .result = task.result + first_row * kBlockColumns});
    first_row += rows;
  }
}

// As Arithmetic::saturate: add(sum, codes) adds up `products` of them a word.
template <class V, class Add>
std::int64_t saturate_sums(std::int64_t rounds, int products, const Add& add) {
  constexpr int kSums = kSaturatingSums;
  I sum[kSums];
  I codes = V::broadcast_word(&kSums);
  unrolled<kSums>([&]<int i>() __attribute__((always_inline)) {
    sum[i] = V::zero_words();
    V::keep_in_register(sum[i]);
  });
  for (std::int64_t round = 0; round < rounds; ++round) {
    unrolled<kSums>([&]<int i>() __attribute__((always_inline)) {
      V::keep_in_register(codes);  // or the compiler multiplies once for all
      add(sum[i], codes);
    });
  }
  alignas(64) float total[V::kLanes * kSums];
  unrolled<kSums>([&]<int i>() __attribute__((always_inline)) {
    V::store(total + i * V::kLanes, V::to_float(sum[i]));
  });
  __asm__ volatile("" : : "r"(total) : "memory");
  return rounds * kSums * V::kLanes * products;
}

// For 4-bit codes.
template <int kHalves, class V>
std::int64_t saturate_integers(std::int64_t rounds) {
  return saturate_sums<V>(rounds, 4 / kHalves, [](I& sum, I codes) __attribute__((always_inline)) {
    if constexpr (HasDot<V>) {
      V::template dot<4>(sum, codes, codes);
    } else {
      V::dot_narrow(sum, codes, codes);
    }
  });
}

// int16 (two halves) or int8 (one) where Vec has `dot`.
template <int kHalves>
constexpr Arithmetic integer_arithmetic() {
  constexpr int kRows = kHalves == 2 ? Vec::kInt16Rows : Vec::kInt8Rows;
  return {.native = true,
          .integer = true,
          .tile_rows = kRows,
          .element_bytes = kHalves,
          .prepare = prepare_integers<kHalves>,
          .gemm = gemm_integer<kHalves, kRows>,
          .saturate = saturate_integers<kHalves, Vec>};
}

// int16 and int8 on integers.
constexpr IsaKernels with_integers(IsaKernels entry) {
  entry.int16 = integer_arithmetic<2>();
  entry.int8 = integer_arithmetic<1>();
  return entry;
}

}  // namespace
}  // namespace marlinq::cpu::MARLINQ_CPU_ISA
