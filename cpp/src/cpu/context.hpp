// What a CPU context owns between calls. Nothing here is shared with another context.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "core/moe_block_over_phases.hpp"
#include "marlinq/cpu/cpu_backend.hpp"
#include "marlinq/routing.hpp"

namespace marlinq::cpu {

/// Buffers of a context, each with one use at a time.
enum class Scratch : std::uint8_t {
  kInput,      // x as the kernels read it: the gather scratch
  kRunInputs,  // what kernels need to know of x in each run of packed rows
  kMoe,        // first of the MoeScratch matrices
};

/// One row of the input through one row of the output.
struct RowMap {
  std::int64_t input = 0;
  std::int64_t output = 0;
  float weight = 1.0F;
  float restore = 1.0F;  // undoes the power of two that x was scaled by
};

/// Consecutive entries of the row maps that one expert multiplies.
struct RowGroup {
  std::int32_t expert = 0;
  std::int64_t first = 0;
  std::int64_t count = 0;
};

/// x of one row group in one packed row order, as the kernels read it.
struct PreparedInput {
  std::int32_t group = 0;        // of the row groups
  std::int32_t order = 0;        // of the expert's orders
  std::int64_t x = 0;            // bytes from the start of Scratch::kInput
  std::int64_t run_inputs = -1;  // the first, of those in Scratch::kRunInputs; -1: not wanted
  std::int64_t rows = 0;         // rows of all prepared inputs before this one
  // Where the first of the group begins.
  std::int64_t group_x = 0;
  std::int64_t group_run_inputs = 0;
  std::int64_t group_cost = 0;  // of the segments before it
};

/// One chunk of rows through all column blocks of one module.
struct Segment {
  std::int32_t prepared = 0;
  std::int32_t module = 0;
  std::int64_t first_row = 0;  // inside the row group
  std::int32_t rows = 0;
  std::int64_t cost = 0;  // of all segments before this one
  std::int64_t block_cost = 0;
};

struct ContextState {
  static constexpr std::size_t kScratches =
      static_cast<std::size_t>(Scratch::kMoe) + static_cast<std::size_t>(MoeScratch::kShared) + 1;

  // Elements of a group's prepared inputs up to which each part of a product prepares its own: a few
  // microseconds of work.
  static constexpr std::int64_t kMostPreparedByParts = 6 << 10;

  int threads = 1;
  std::int64_t scratch_allocations = 0;
  std::array<CpuBuffer, kScratches> scratch;

  // Lists of the call in progress, kept for their memory.
  std::vector<RowMap> rows;
  std::vector<RowGroup> groups;
  std::vector<std::int64_t> zero_rows;  // of the output
  std::vector<PreparedInput> prepared;
  std::vector<Segment> segments;
  TokenTiles tiles;

  /// At least `elements` floats; grows only. Throws out_of_memory.
  float* grow(std::size_t slot, std::int64_t elements);
  /// Room for what a forward of m rows and K input features keeps of its input, m * K = `elements`.
  void pregrow(std::int64_t elements);
  float* grow(Scratch slot, std::int64_t elements) {
    return grow(static_cast<std::size_t>(slot), elements);
  }
};

}  // namespace marlinq::cpu
