// Repacks validated GPTQ weights into the order of layout.hpp.
#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "core/codes.hpp"
#include "core/elements.hpp"
#include "core/zero_point_names.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/packed.hpp"
#include "cpu/parallel.hpp"

namespace marlinq::cpu {
namespace {

// What one column block is packed from and to.
struct BlockTarget {
  const ValidatedModule& module;
  const PackedModule& packed;
  const RowOrder& order;
  std::uint8_t* memory;
  std::int64_t block;
  int bits;

  std::int64_t first_column() const noexcept { return block * Layout::kBlockColumns; }
  int columns() const noexcept { return packed.layout.block_columns(block); }
  // Columns that exist; the rest is padding.
  int real_columns() const noexcept {
    return static_cast<int>(std::min<std::int64_t>(columns(), module.n - first_column()));
  }
};

// Whether packed rows [first, first + count) are those of one word of qweight, in its order.
bool is_one_word(const std::vector<std::int32_t>& source, std::int64_t first, int count) noexcept {
  const std::int32_t* rows = source.data() + first;
  if (rows[0] < 0 || rows[0] % count != 0) return false;
  for (int r = 1; r < count; ++r) {
    if (rows[r] != rows[0] + r) return false;
  }
  return true;
}

// The four nibbles of 16 bits, one a byte.
constexpr std::uint32_t spread_nibbles(std::uint32_t bits) noexcept {
  const std::uint32_t pairs = (bits | bits << 8) & 0x00FF00FFU;
  return (pairs | pairs << 4) & 0x0F0F0F0FU;
}

// The words of one row of qweight in the order of the layout.
void place_words(const BlockTarget& target, std::int64_t row, int count, std::uint32_t* words) {
  const std::uint8_t* source =
      target.module.qweight + (row * target.module.n + target.first_column()) * 4;
  std::memcpy(words, source, sizeof(std::uint32_t) * static_cast<std::size_t>(count));
  if (target.packed.layout.code_bits == 8) return;  // the same order
  for (int i = 0; i < Layout::kBlockColumns; ++i) {
    words[i] = spread_nibbles(words[i] & 0xFFFFU) | spread_nibbles(words[i] >> 16) << 4;
  }
}

void pack_codes(const BlockTarget& target) {
  const Layout& layout = target.packed.layout;
  const int step = Layout::rows_per_dword(layout.code_bits);
  const int real = target.real_columns();
  const auto middle = std::uint32_t{1} << (target.bits - 1);
  std::uint8_t* block = target.memory + target.packed.codes + layout.code_offset(target.block);
  for (std::int64_t first = 0; first < layout.packed_rows; first += step) {
    std::uint32_t words[Layout::kBlockColumns] = {};
    const bool whole =
        target.bits == layout.code_bits && is_one_word(target.order.source, first, step);
    if (whole) {
      place_words(target, target.order.source[static_cast<std::size_t>(first)] / step, real, words);
    }
    for (int r = 0; r < step && !whole; ++r) {
      const std::int32_t row = target.order.source[static_cast<std::size_t>(first + r)];
      const int place = layout.bit_of_row(r);
      if (row >= 0) {
        place_code_row(target.module.qweight, target.bits, target.module.n, row,
                       target.first_column(), real, place, words);
      } else {
        for (int column = 0; column < real; ++column) words[column] |= middle << place;
      }
    }
    std::memcpy(block + layout.row_offset(target.block, first), words,
                sizeof(std::uint32_t) * static_cast<std::size_t>(target.columns()));
  }
}

void pack_groups(const BlockTarget& target) {
  const Layout& layout = target.packed.layout;
  const auto real = static_cast<std::size_t>(target.real_columns());
  const std::size_t size = size_of(target.module.scale_dtype);
  for (std::int64_t group = 0; group < layout.groups; ++group) {
    const std::int64_t place = layout.group_offset(target.block) + group * target.columns();
    const std::int64_t source = group * target.module.n + target.first_column();
    std::memcpy(target.memory + target.packed.scales + place * static_cast<std::int64_t>(size),
                element(target.module.scales, target.module.scale_dtype, source), real * size);
    if (target.packed.zeros < 0) continue;
    std::uint8_t zeros[Layout::kBlockColumns] = {};
    read_zero_points(target.module, target.bits, group, target.first_column(),
                     static_cast<int>(real), zeros);
    std::uint8_t* packed = target.memory + target.packed.zeros + place * layout.code_bits / 8;
    for (int column = 0; column < target.columns(); ++column) {
      if (layout.code_bits == 8) {
        packed[column] = zeros[column];
      } else if (column % 2 == 0) {
        packed[column / 2] = static_cast<std::uint8_t>(zeros[column] | zeros[column + 1] << 4);
      }
    }
  }
}

void pack_bias(const BlockTarget& target) {
  if (target.packed.bias < 0) return;
  for (int i = 0; i < target.real_columns(); ++i) {
    const float value =
        read_float(target.module.bias, target.module.bias_dtype, target.first_column() + i);
    std::memcpy(target.memory + target.packed.bias + (target.first_column() + i) * 4, &value,
                sizeof value);
  }
}

// Modules with equal group_of_row share one order, also across experts that follow each other.
class OrderCache {
 public:
  std::shared_ptr<const RowOrder> get(const ValidatedModule& module, std::int64_t groups) {
    if (order_ == nullptr || groups != groups_ || *key_ != module.group_of_row) {
      order_ = std::make_shared<const RowOrder>(
          make_row_order(module.group_of_row, groups, Layout::kRowAlignment, Layout::kMaxRowBlock));
      key_ = &module.group_of_row;
      groups_ = groups;
    }
    return order_;
  }

 private:
  const std::vector<std::int32_t>* key_ = nullptr;
  std::int64_t groups_ = 0;
  std::shared_ptr<const RowOrder> order_;
};

}  // namespace

class Packer {
 public:
  Packer(std::span<const GptqWeights> experts, const IsaKernels& isa, Compute compute)
      : experts_(experts), compute_(compute), result_(std::make_shared<PackedExperts>()) {
    result_->isa_ = &isa;
    result_->arithmetic_ = &arithmetic_of(isa, compute);
    result_->k_ = experts.front().k;
    result_->n_ = experts.front().n;
    result_->experts_.resize(experts.size());
  }

  std::shared_ptr<const PackedExperts> run(int threads) {
    place();
    fill(threads);
    describe();
    return result_;
  }

 private:
  // Decides where everything lies; one expert after the other.
  void place() {
    OrderCache orders;
    std::int64_t offset = 0;
    const auto reserve = [&offset](std::int64_t bytes) {
      const std::int64_t at = offset;
      offset += round_up(bytes, static_cast<std::int64_t>(CpuBuffer::kAlignment));
      return at;
    };
    for (std::size_t e = 0; e < experts_.size(); ++e) {
      const GptqWeights& weights = experts_[e];
      PackedExpert& expert = result_->experts_[e];
      expert.begin = offset;
      std::int64_t first_column = 0;
      for (std::size_t i = 0; i < weights.modules.size(); ++i) {
        const ValidatedModule& module = weights.modules[i];
        std::shared_ptr<const RowOrder> order = orders.get(module, weights.groups);
        if (expert.orders.empty() || expert.orders.back() != order) expert.orders.push_back(order);
        PackedModule packed;
        packed.layout = {.code_bits = weights.bits == 8 ? 8 : 4,
                         .n = module.n,
                         .packed_rows = order->rows(),
                         .groups = weights.groups};
        packed.first_column = first_column;
        packed.scale_type = float_type(module.scale_dtype);
        packed.order = static_cast<std::int32_t>(expert.orders.size()) - 1;
        packed.codes = reserve(packed.layout.code_bytes());
        packed.scales = reserve(packed.layout.group_elements() *
                                static_cast<std::int64_t>(size_of(module.scale_dtype)));
        if (!symmetric_in_all(i)) packed.zeros = reserve(packed.layout.zero_bytes());
        if (module.bias != nullptr) packed.bias = reserve(packed.layout.padded_columns() * 4);
        first_column += module.n;
        expert.modules.push_back(packed);
      }
      expert.bytes = offset - expert.begin;
    }
    result_->memory_ = CpuBuffer(DType::kInt32, offset / 4);
  }

  // Experts have one form: zero points are left out only where no expert needs them.
  bool symmetric_in_all(std::size_t module) const {
    return std::all_of(experts_.begin(), experts_.end(), [module](const GptqWeights& weights) {
      return weights.modules[module].symmetric;
    });
  }

  void fill(int threads) {
    auto* memory = static_cast<std::uint8_t*>(result_->memory_.data());
    std::int64_t blocks_per_expert = 0;
    for (const PackedModule& module : result_->experts_.front().modules)
      blocks_per_expert += module.layout.blocks();
    const std::int64_t expert_count = result_->num_experts();
    // Below this many bytes a thread is not worth waking.
    constexpr std::int64_t kSerialBytes = 1 << 18;
    if (result_->memory_.size() * 4 < kSerialBytes) threads = 1;
    // Padding between sections is zero, so that equal weights have equal bytes.
    parallel_for(threads, expert_count, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t e = begin; e < end; ++e) clear_unwritten(memory, result_->expert(e));
    });
    parallel_for(threads, expert_count * blocks_per_expert, 1,
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t unit = begin; unit < end; ++unit) {
                     const auto e = static_cast<std::size_t>(unit / blocks_per_expert);
                     std::int64_t block = unit % blocks_per_expert;
                     std::size_t i = 0;
                     while (block >= result_->experts_[e].modules[i].layout.blocks()) {
                       block -= result_->experts_[e].modules[i++].layout.blocks();
                     }
                     const PackedExpert& expert = result_->experts_[e];
                     const PackedModule& packed = expert.modules[i];
                     const BlockTarget target{
                         .module = experts_[e].modules[i],
                         .packed = packed,
                         .order = *expert.orders[static_cast<std::size_t>(packed.order)],
                         .memory = memory,
                         .block = block,
                         .bits = experts_[e].bits};
                     pack_codes(target);
                     pack_groups(target);
                     pack_bias(target);
                   }
                 });
  }

  // Everything after the codes of a module: padded columns of its scales, zero points and bias stay
  // zero.
  static void clear_unwritten(std::uint8_t* memory, const PackedExpert& expert) {
    for (std::size_t i = 0; i < expert.modules.size(); ++i) {
      const PackedModule& module = expert.modules[i];
      const std::int64_t begin = module.codes + module.layout.code_bytes();
      const std::int64_t end =
          i + 1 < expert.modules.size() ? expert.modules[i + 1].codes : expert.begin + expert.bytes;
      std::memset(memory + begin, 0, static_cast<std::size_t>(end - begin));
    }
  }

  void describe() {
    const GptqWeights& first = experts_.front();
    Description& d = result_->description_;
    d.backend = CpuBackend::kName;
    d.device = to_string(Device{});
    d.arch = result_->isa().name;
    d.kernel = result_->isa().name;
    d.compute = to_string(compute_);
    d.schedule = "columns " + std::to_string(Layout::kBlockColumns) + ", rows " +
                 std::to_string(result_->arithmetic().tile_rows) + ", k " +
                 std::to_string(Layout::kMaxRowBlock);
    if (!result_->arithmetic().native) d.schedule += ", emulated by float32";
    d.bits = first.bits;
    d.group_size = first.group_size;
    d.k = first.k;
    d.n = first.n;
    d.num_experts = result_->num_experts();
    d.batch_invariant = true;  // the order of a row's sums never depends on the other rows
    d.scale_dtype = to_string(first.modules.front().scale_dtype);
    d.bias = std::any_of(first.modules.begin(), first.modules.end(),
                         [](const ValidatedModule& part) { return part.bias != nullptr; });
    for (const PackedModule& module : result_->experts_.front().modules) {
      d.fused.push_back(module.layout.n);
      d.n_padded += module.layout.padded_columns();
    }
    d.symmetric = true;
    for (std::size_t e = 0; e < experts_.size(); ++e) {
      PackedExpert& expert = result_->experts_[e];
      describe_expert(experts_[e], expert);
      d.packed_bytes += expert.bytes;
      d.checkpoint_bytes += expert.checkpoint_bytes;
      d.symmetric = d.symmetric && expert.symmetric;
      d.act_order = d.act_order || expert.act_order;
      d.zero_points = e == 0 || d.zero_points == expert.zero_points ? expert.zero_points : "mixed";
      d.warnings.insert(d.warnings.end(), expert.warnings.begin(), expert.warnings.end());
      for (const auto& order : expert.orders) d.k_padded = std::max(d.k_padded, order->rows());
    }
  }

  static void describe_expert(const GptqWeights& weights, PackedExpert& expert) {
    expert.symmetric = true;
    for (const ValidatedModule& module : weights.modules) {
      expert.symmetric = expert.symmetric && module.symmetric;
      expert.act_order = expert.act_order || module.act_order;
      expert.checkpoint_bytes += static_cast<std::int64_t>(module.bytes);
    }
    expert.zero_points = zero_point_names(weights);
    expert.warnings = weights.warnings;
  }

  std::span<const GptqWeights> experts_;
  Compute compute_;
  std::shared_ptr<PackedExperts> result_;
};

Description PackedExperts::description(std::int64_t index) const {
  const PackedExpert& one = expert(index);
  Description d = description_;
  d.num_experts = 1;
  d.k_padded = 0;
  for (const auto& order : one.orders) d.k_padded = std::max(d.k_padded, order->rows());
  d.symmetric = one.symmetric;
  d.act_order = one.act_order;
  d.zero_points = one.zero_points;
  d.packed_bytes = one.bytes;
  d.checkpoint_bytes = one.checkpoint_bytes;
  d.warnings = one.warnings;
  return d;
}

std::shared_ptr<const PackedExperts> pack_experts(std::span<const GptqWeights> experts,
                                                  const IsaKernels& isa, Compute compute,
                                                  int threads) {
  return Packer(experts, isa, compute).run(threads);
}

}  // namespace marlinq::cpu
