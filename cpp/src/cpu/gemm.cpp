#include "cpu/gemm.hpp"

#include <algorithm>
#include <cstring>
#include <span>
#include <vector>

#include "core/elements.hpp"
#include "core/integers.hpp"
#include "cpu/parallel.hpp"

namespace marlinq::cpu {
namespace {

// Below this many multiplications a call is over before another thread has woken up.
constexpr std::int64_t kSerialWork = std::int64_t{1} << 17;
// Rows of x with elements from here on are scaled down by as much: float32 ends at 2^128, and
// codes, K and scales together stay far below 2^64. Rows of elements below the inverse are scaled
// up, so that the scale of their integers is not subnormal.
constexpr float kLargeInput = 0x1p64F;

RowTiles cut(std::int64_t rows, std::int32_t most) noexcept {
  const auto count = static_cast<std::int32_t>(ceil_div(rows, most));
  return {.count = count,
          .base = static_cast<std::int32_t>(rows / count),
          .larger = static_cast<std::int32_t>(rows % count)};
}

std::int64_t first_row(const RowTiles& tiles, std::int64_t tile) noexcept {
  return tile * tiles.base + std::min<std::int64_t>(tile, tiles.larger);
}

std::int32_t row_count(const RowTiles& tiles, std::int64_t tile) noexcept {
  return tiles.base + (tile < tiles.larger ? 1 : 0);
}

// The tile that has `row`.
std::int64_t piece_of(const RowTiles& tiles, std::int64_t row) noexcept {
  const std::int64_t in_larger = std::int64_t{tiles.larger} * (tiles.base + 1);
  if (row < in_larger) return row / (tiles.base + 1);
  return tiles.larger + (row - in_larger) / tiles.base;
}

// Where a prepared input lies.
struct Place {
  std::uint8_t* x;
  RunInput* run_inputs;  // null: not wanted
};

class RowGroupProduct {
 public:
  RowGroupProduct(ContextState& state, const PackedExperts& packed, const ConstMatrixView& input,
                  const MatrixView& output)
      : state_(state),
        packed_(packed),
        isa_(packed.isa()),
        arithmetic_(packed.arithmetic()),
        input_(input),
        output_(output) {}

  void run() {
    plan();
    if (!prepared_by_parts_) {
      parallel_parts(
          static_cast<int>(std::min<std::int64_t>(threads_, rows_)),
          [&](int part, int parts) { prepare(rows_ * part / parts, rows_ * (part + 1) / parts); });
    }
    parallel_parts(static_cast<int>(std::min<std::int64_t>(threads_, cost_)),
                   [&](int part, int parts) {
                     multiply(part, cost_ * part / parts, cost_ * (part + 1) / parts);
                   });
  }

 private:
  // Lists what has to be prepared and multiplied, and makes room for it.
  void plan() {
    state_.prepared.clear();
    state_.segments.clear();
    std::int64_t bytes = 0;
    std::int64_t run_inputs = 0;
    std::int64_t work = 0;
    std::int64_t most_elements = 0;
    for (std::size_t g = 0; g < state_.groups.size(); ++g) {
      const RowGroup& group = state_.groups[g];
      const PackedExpert& expert = packed_.expert(group.expert);
      const auto first_prepared = static_cast<std::int32_t>(state_.prepared.size());
      const std::int64_t first_byte = bytes;
      const std::int64_t first_run_input = run_inputs;
      std::int64_t elements = 0;
      for (std::size_t o = 0; o < expert.orders.size(); ++o) {
        const RowOrder& order = *expert.orders[o];
        const bool wants_run_inputs =
            arithmetic_.integer ||
            std::any_of(expert.modules.begin(), expert.modules.end(), [o](const auto& module) {
              return module.order == static_cast<std::int32_t>(o) && module.zeros >= 0;
            });
        state_.prepared.push_back({.group = static_cast<std::int32_t>(g),
                                   .order = static_cast<std::int32_t>(o),
                                   .x = bytes,
                                   .run_inputs = wants_run_inputs ? run_inputs : -1,
                                   .rows = rows_,
                                   .group_x = first_byte,
                                   .group_run_inputs = first_run_input,
                                   .group_cost = cost_});
        elements += group.count * order.rows();
        bytes += group.count * order.rows() * arithmetic_.element_bytes;
        if (wants_run_inputs) {
          run_inputs += group.count * static_cast<std::int64_t>(order.blocks.size());
        }
        rows_ += group.count;
      }
      most_elements = std::max(most_elements, elements);
      copy_bytes_ = std::max(copy_bytes_, bytes - first_byte);
      copy_run_inputs_ = std::max(copy_run_inputs_, run_inputs - first_run_input);
      add_segments(group, expert, first_prepared);
      work += group.count * packed_.k() * packed_.n();
    }
    threads_ = work < kSerialWork ? 1 : state_.threads;
    prepared_by_parts_ = threads_ == 1 || most_elements <= ContextState::kMostPreparedByParts;
    reserve(bytes, run_inputs);
  }

  // Room for prepared inputs, and for copies of a group's if they are by parts: whether or not they are,
  // so that fewer rows never need more.
  void reserve(std::int64_t bytes, std::int64_t run_inputs) {
    constexpr auto kFloat = static_cast<std::int64_t>(sizeof(float));
    constexpr std::int64_t kFloatsOfRunInput = static_cast<std::int64_t>(sizeof(RunInput)) / kFloat;
    constexpr auto kLine = static_cast<std::int64_t>(CpuBuffer::kAlignment);
    constexpr std::int64_t kMost = ContextState::kMostPreparedByParts;
    const std::int64_t copies = state_.threads - 1;
    copy_bytes_ = round_up(std::min(copy_bytes_, kMost * arithmetic_.element_bytes), kLine);
    copy_run_inputs_ =
        round_up(std::min(copy_run_inputs_, kMost / Layout::kRowAlignment), kLine / kFloat);
    first_copy_ = round_up(bytes, kLine);
    first_copied_run_input_ = round_up(run_inputs, kLine / kFloat);
    x_ = reinterpret_cast<std::uint8_t*>(
        state_.grow(Scratch::kInput, (first_copy_ + copies * copy_bytes_) / kFloat));
    run_inputs_ = reinterpret_cast<RunInput*>(
        state_.grow(Scratch::kRunInputs,
                    (first_copied_run_input_ + copies * copy_run_inputs_) * kFloatsOfRunInput));
  }

  void add_segments(const RowGroup& group, const PackedExpert& expert,
                    std::int32_t first_prepared) {
    const RowTiles chunks = cut(group.count, kMaxTaskRows);
    for (std::int32_t c = 0; c < chunks.count; ++c) {
      for (std::size_t i = 0; i < expert.modules.size(); ++i) {
        // Reading and unpacking a block costs about as much as multiplying it with this many rows.
        constexpr std::int64_t kUnpackRows = 3;
        Segment segment{.prepared = first_prepared + expert.modules[i].order,
                        .module = static_cast<std::int32_t>(i),
                        .first_row = first_row(chunks, c),
                        .rows = row_count(chunks, c),
                        .cost = cost_,
                        .block_cost = row_count(chunks, c) + kUnpackRows};
        state_.segments.push_back(segment);
        cost_ += segment.block_cost * expert.modules[i].layout.blocks();
      }
    }
  }

  // Prepares the rows [begin, end) of all prepared inputs, one after the other.
  void prepare(std::int64_t begin, std::int64_t end) const {
    auto next =
        std::upper_bound(state_.prepared.begin(), state_.prepared.end(), begin,
                         [](std::int64_t row, const PreparedInput& p) { return row < p.rows; });
    for (std::size_t i = static_cast<std::size_t>(next - state_.prepared.begin()) - 1;
         i < state_.prepared.size() && state_.prepared[i].rows < end; ++i) {
      const PreparedInput& prepared = state_.prepared[i];
      const Place place = shared_place(prepared);
      const RowGroup& group = state_.groups[static_cast<std::size_t>(prepared.group)];
      const std::int64_t last = std::min(end - prepared.rows, group.count);
      for (std::int64_t row = std::max<std::int64_t>(begin - prepared.rows, 0); row < last; ++row) {
        const float restore = prepare_row(prepared, group, place, row);
        if (prepared.order == 0) row_map(group, row).restore = restore;
      }
    }
  }

  RowMap& row_map(const RowGroup& group, std::int64_t row) const {
    return state_.rows[static_cast<std::size_t>(group.first + row)];
  }

  Place shared_place(const PreparedInput& prepared) const {
    return {.x = x_ + prepared.x,
            .run_inputs = prepared.run_inputs < 0 ? nullptr : run_inputs_ + prepared.run_inputs};
  }

  // Where a part that begins at cost `begin` has a prepared input: in the shared place if its group
  // begins in this part, else in the part's copy, since each has at most one such group.
  Place place_of_part(std::int32_t index, int part, std::int64_t begin) const {
    const PreparedInput& prepared = state_.prepared[static_cast<std::size_t>(index)];
    Place place = shared_place(prepared);
    if (!prepared_by_parts_ || prepared.group_cost >= begin) return place;
    place.x += first_copy_ + (part - 1) * copy_bytes_ - prepared.group_x;
    if (place.run_inputs != nullptr) {
      place.run_inputs +=
          first_copied_run_input_ + (part - 1) * copy_run_inputs_ - prepared.group_run_inputs;
    }
    return place;
  }

  // Takes a row of x to the form of the arithmetic, in its tile. Returns what undoes the power of two
  // that the row was scaled by.
  float prepare_row(const PreparedInput& prepared, const RowGroup& group, const Place& place,
                    std::int64_t row) const {
    const RowOrder& order =
        *packed_.expert(group.expert).orders[static_cast<std::size_t>(prepared.order)];
    const RowTiles chunks = cut(group.count, kMaxTaskRows);
    const std::int64_t chunk = piece_of(chunks, row);
    const std::int64_t in_chunk = row - first_row(chunks, chunk);
    const Arithmetic& arithmetic = arithmetic_of(row_count(chunks, chunk));
    const RowTiles tiles = cut(row_count(chunks, chunk), arithmetic.tile_rows);
    const std::int64_t tile = piece_of(tiles, in_chunk);
    const auto in_tile = static_cast<std::int32_t>(in_chunk - first_row(tiles, tile));
    const std::int64_t first = row - in_tile;
    const auto runs = static_cast<std::int64_t>(order.blocks.size());
    const PrepareTask task{
        .values = nullptr,
        .runs = order.blocks.data(),
        .num_runs = 0,
        .code_bits = packed_.code_bits(),
        .middle = packed_.middle(),
        .tile_rows = row_count(tiles, tile),
        .row = in_tile,
        .x = place.x + first * order.rows() * arithmetic_.element_bytes,
        .run_inputs = place.run_inputs == nullptr ? nullptr : place.run_inputs + first * runs,
    };
    const std::int64_t input = row_map(group, row).input;
    float restore = 1.0F;
    const float largest = prepare_row(arithmetic, task, order, input, 1.0F);
    if (largest >= kLargeInput) {
      // Sums of such a row could overflow where the result does not: a power of two is exact.
      restore = kLargeInput;
    } else if (largest > 0.0F && largest < 1.0F / kLargeInput) {
      restore = 1.0F / kLargeInput;
    }
    if (restore != 1.0F) prepare_row(arithmetic, task, order, input, 1.0F / restore);
    return restore;
  }

  // For the rows of a chunk.
  const Arithmetic& arithmetic_of(std::int32_t rows) const noexcept {
    return rows <= arithmetic_.most_few_rows ? *arithmetic_.few_rows : arithmetic_;
  }

  // Prepares factor * x of one input row, and returns the largest finite magnitude of x.
  float prepare_row(const Arithmetic& arithmetic, PrepareTask task, const RowOrder& order,
                    std::int64_t row, float factor) const {
    const std::uint8_t* source = element(input_.data, input_.dtype, row * input_.row_stride);
    const std::span<const RowBlock> runs = order.blocks;
    float values[Layout::kMaxRowBlock];
    float largest = 0.0F;
    for (std::size_t first = 0, last = 0; first < runs.size(); first = last) {
      last += static_cast<std::size_t>(
          runs_of_one_scale(&runs[first], static_cast<std::int32_t>(runs.size() - first)));
      const std::int64_t count = runs[last - 1].first + runs[last - 1].count - runs[first].first;
      read_values(order, source, runs[first].first, count, values);
      std::fill(values + count, values + Layout::kMaxRowBlock, 0.0F);
      if (factor != 1.0F) {
        for (std::int64_t i = 0; i < count; ++i) values[i] *= factor;
      }
      task.values = values;
      task.runs = runs.data() + first;
      task.num_runs = static_cast<std::int32_t>(last - first);
      largest = std::max(largest, arithmetic.prepare(task));
      if (task.run_inputs != nullptr) task.run_inputs += task.num_runs * task.tile_rows;
    }
    return largest;
  }

  // Elements of an input row at packed rows [first, first + count), as float32; 0 where padded.
  void read_values(const RowOrder& order, const std::uint8_t* source, std::int64_t first,
                   std::int64_t count, float* values) const {
    const FloatType type = float_type(input_.dtype);
    const std::size_t size = size_of(input_.dtype);
    if (order.identity) {
      const std::int64_t real = std::clamp<std::int64_t>(packed_.k() - first, 0, count);
      isa_.to_float(type, source + static_cast<std::size_t>(first) * size, values, real);
      std::fill(values + real, values + count, 0.0F);
    } else {
      std::uint8_t gathered[Layout::kMaxRowBlock * sizeof(float)];
      gather(order, source, first, count, size, gathered);
      isa_.to_float(type, gathered, values, count);
    }
  }

  // Elements of an input row at packed rows [first, first + count); all-zero bits where padded.
  static void gather(const RowOrder& order, const std::uint8_t* source, std::int64_t first,
                     std::int64_t count, std::size_t size, std::uint8_t* target) {
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int32_t from = order.source[static_cast<std::size_t>(first + i)];
      std::uint8_t* place = target + static_cast<std::size_t>(i) * size;
      if (from < 0) {
        std::memset(place, 0, size);
      } else {
        std::memcpy(place, source + static_cast<std::size_t>(from) * size, size);
      }
    }
  }

  // Runs the column blocks whose cost begins in [begin, end).
  void multiply(int part, std::int64_t begin, std::int64_t end) const {
    alignas(64) float result[kMaxTaskRows * Layout::kBlockColumns];
    float restore[kMaxTaskRows];
    const Segment* ready = nullptr;  // the one that `restore` is of
    auto next = std::upper_bound(state_.segments.begin(), state_.segments.end(), begin,
                                 [](std::int64_t cost, const Segment& s) { return cost < s.cost; });
    for (std::size_t i = static_cast<std::size_t>(next - state_.segments.begin()) - 1;
         i < state_.segments.size() && state_.segments[i].cost < end; ++i) {
      const Segment& segment = state_.segments[i];
      const PreparedInput& prepared = state_.prepared[static_cast<std::size_t>(segment.prepared)];
      const RowGroup& group = state_.groups[static_cast<std::size_t>(prepared.group)];
      const PackedExpert& expert = packed_.expert(group.expert);
      const PackedModule& module = expert.modules[static_cast<std::size_t>(segment.module)];
      const std::int64_t first_block =
          begin <= segment.cost ? 0 : ceil_div(begin - segment.cost, segment.block_cost);
      const std::int64_t last_block =
          std::min(module.layout.blocks(), ceil_div(end - segment.cost, segment.block_cost));
      if (first_block >= last_block) continue;
      const Place place = place_of_part(segment.prepared, part, begin);
      if (ready == nullptr || ready->prepared != segment.prepared ||
          ready->first_row != segment.first_row) {
        for (std::int32_t r = 0; r < segment.rows; ++r) {
          const std::int64_t row = segment.first_row + r;
          restore[r] = prepared_by_parts_ ? prepare_row(prepared, group, place, row)
                                          : row_map(group, row).restore;
        }
        ready = &segment;
      }
      for (std::int64_t block = first_block; block < last_block; ++block) {
        multiply_block(segment, place, expert, module, block, result);
        store_block(segment, group, module, block, restore, result);
      }
    }
  }

  void multiply_block(const Segment& segment, const Place& place, const PackedExpert& expert,
                      const PackedModule& module, std::int64_t block, float* result) const {
    const RowOrder& order = *expert.orders[static_cast<std::size_t>(module.order)];
    const Layout& layout = module.layout;
    const auto runs = static_cast<std::int32_t>(order.blocks.size());
    const auto scale_size = module.scale_type == FloatType::kF32 ? 4 : 2;
    const Arithmetic& arithmetic = arithmetic_of(segment.rows);
    const std::uint8_t* data = packed_.data();
    const BlockTask task{
        .codes = data + module.codes + layout.code_offset(block),
        .scales = data + module.scales + layout.group_offset(block) * scale_size,
        .zeros = module.zeros < 0 ? nullptr : data + module.zeros + layout.zero_offset(block),
        .scale_type = module.scale_type,
        .code_bits = layout.code_bits,
        .middle = packed_.middle(),
        .columns = layout.block_columns(block),
        .runs = order.blocks.data(),
        .num_runs = runs,
        .packed_rows = layout.packed_rows,
        .x = place.x + segment.first_row * layout.packed_rows * arithmetic_.element_bytes,
        .run_inputs =
            place.run_inputs == nullptr ? nullptr : place.run_inputs + segment.first_row * runs,
        .rows = segment.rows,
        .tiles = cut(segment.rows, arithmetic.tile_rows),
        .result = result,
    };
    arithmetic.gemm(task);
  }

  // Adds the bias, applies the row's weight, rounds once.
  void store_block(const Segment& segment, const RowGroup& group, const PackedModule& module,
                   std::int64_t block, const float* restore, float* result) const {
    const std::int64_t column = block * Layout::kBlockColumns;
    const std::int64_t columns =
        std::min<std::int64_t>(module.layout.n - column, Layout::kBlockColumns);
    const auto* bias = module.bias < 0
                           ? nullptr
                           : reinterpret_cast<const float*>(packed_.data() + module.bias) + column;
    for (std::int32_t r = 0; r < segment.rows; ++r) {
      const RowMap& map = row_map(group, segment.first_row + r);
      float* values = result + r * Layout::kBlockColumns;
      if (restore[r] != 1.0F) {
        // In double, as a step between may be out of range where the result is not.
        for (std::int64_t i = 0; i < columns; ++i) {
          const double sum = static_cast<double>(values[i]) * static_cast<double>(restore[r]) +
                             static_cast<double>(bias == nullptr ? 0.0F : bias[i]);
          values[i] = static_cast<float>(sum * static_cast<double>(map.weight));
        }
      } else {
        if (bias != nullptr) {
          for (std::int64_t i = 0; i < columns; ++i) values[i] += bias[i];
        }
        if (map.weight != 1.0F) {
          for (std::int64_t i = 0; i < columns; ++i) values[i] *= map.weight;
        }
      }
      const std::int64_t place = map.output * output_.row_stride + module.first_column + column;
      isa_.from_float(float_type(output_.dtype), values,
                      static_cast<std::uint8_t*>(output_.data) +
                          place * static_cast<std::int64_t>(size_of(output_.dtype)),
                      columns);
    }
  }

  ContextState& state_;
  const PackedExperts& packed_;
  const IsaKernels& isa_;
  const Arithmetic& arithmetic_;
  const ConstMatrixView& input_;
  const MatrixView& output_;
  int threads_ = 1;  // of this call
  std::int64_t rows_ = 0;
  std::int64_t cost_ = 0;
  // Each part of the product prepares the rows of x that it multiplies. Memory that one core writes and
  // others read costs more than to prepare some rows twice.
  bool prepared_by_parts_ = false;
  std::uint8_t* x_ = nullptr;
  RunInput* run_inputs_ = nullptr;
  std::int64_t first_copy_ = 0;  // bytes of x_
  std::int64_t copy_bytes_ = 0;
  std::int64_t first_copied_run_input_ = 0;
  std::int64_t copy_run_inputs_ = 0;
};

}  // namespace

void run_row_groups(ContextState& state, const PackedExperts& packed, const ConstMatrixView& input,
                    const MatrixView& output) {
  RowGroupProduct(state, packed, input, output).run();
}

}  // namespace marlinq::cpu
