// Packed weights of the CPU backend, in the order of layout.hpp.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/row_order.hpp"
#include "cpu/isa_table.hpp"
#include "cpu/layout.hpp"
#include "marlinq/cpu/cpu_backend.hpp"

namespace marlinq::cpu {

inline FloatType float_type(DType dtype) noexcept {
  return dtype == DType::kFloat16    ? FloatType::kF16
         : dtype == DType::kBFloat16 ? FloatType::kBF16
                                     : FloatType::kF32;
}

/// One module of one expert. Offsets are bytes from the start of the stack's memory.
struct PackedModule {
  Layout layout;
  std::int64_t first_column = 0;  // of the output
  std::int64_t codes = 0;
  std::int64_t scales = 0;
  std::int64_t zeros = -1;  // -1: absent
  std::int64_t bias = -1;
  FloatType scale_type = FloatType::kF32;
  std::int32_t order = 0;  // index into PackedExpert::orders
};

/// One expert: modules fused along N, contiguous in memory.
struct PackedExpert {
  std::int64_t begin = 0;
  std::int64_t bytes = 0;
  std::vector<PackedModule> modules;
  std::vector<std::shared_ptr<const RowOrder>> orders;  // neighbours differ

  // For describe().
  bool symmetric = false;
  bool act_order = false;
  std::string zero_points;
  std::int64_t checkpoint_bytes = 0;
  std::vector<std::string> warnings;
};

/// The weights of all experts of one projection. Immutable once pack() has returned it.
class PackedExperts {
 public:
  std::int64_t num_experts() const noexcept { return static_cast<std::int64_t>(experts_.size()); }
  std::int64_t k() const noexcept { return k_; }
  std::int64_t n() const noexcept { return n_; }

  const IsaKernels& isa() const noexcept { return *isa_; }
  const Arithmetic& arithmetic() const noexcept { return *arithmetic_; }
  int code_bits() const noexcept { return description_.bits == 8 ? 8 : 4; }
  int middle() const noexcept { return 1 << (description_.bits - 1); }
  const PackedExpert& expert(std::int64_t index) const {
    return experts_[static_cast<std::size_t>(index)];
  }
  const std::uint8_t* data() const noexcept {
    return static_cast<const std::uint8_t*>(memory_.data());
  }
  /// All packed bytes of one expert.
  std::span<const std::uint8_t> bytes(std::int64_t index) const {
    return {data() + expert(index).begin, static_cast<std::size_t>(expert(index).bytes)};
  }
  /// Of all experts together.
  const Description& description() const noexcept { return description_; }
  /// Of one expert, as if it had been loaded alone.
  Description description(std::int64_t index) const;

 private:
  friend class Packer;

  CpuBuffer memory_;
  std::vector<PackedExpert> experts_;
  const IsaKernels* isa_ = nullptr;
  const Arithmetic* arithmetic_ = nullptr;
  std::int64_t k_ = 0;
  std::int64_t n_ = 0;
  Description description_;
};

/// Packs every expert with `threads` threads, for products with `compute` (not kAuto). What is packed
/// depends on neither. Throws out_of_memory.
std::shared_ptr<const PackedExperts> pack_experts(std::span<const GptqWeights> experts,
                                                  const IsaKernels& isa, Compute compute,
                                                  int threads);

}  // namespace marlinq::cpu
