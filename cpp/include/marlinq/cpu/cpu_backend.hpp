// The CPU backend for typed use: CpuBackend::load_gptq(context, ...) and what it needs.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "marlinq/backend.hpp"
#include "marlinq/export.hpp"
#include "marlinq/registry.hpp"

namespace marlinq {

enum class MoeScratch : std::uint8_t;
struct MoeCombine;

namespace cpu {

struct ContextState;
class PackedExperts;

/// Host memory, aligned for every instruction set. Movable, not copyable; contents start undefined.
class MARLINQ_API CpuBuffer {
 public:
  static constexpr std::size_t kAlignment = 64;  // a cache line, and the widest vector

  CpuBuffer() = default;
  /// Throws out_of_memory.
  CpuBuffer(DType dtype, std::int64_t size);
  CpuBuffer(CpuBuffer&& other) noexcept;
  CpuBuffer& operator=(CpuBuffer&& other) noexcept;
  ~CpuBuffer();

  Device device() const noexcept { return {}; }
  DType dtype() const noexcept { return dtype_; }
  std::int64_t size() const noexcept { return size_; }  // elements
  void* data() noexcept { return data_; }
  const void* data() const noexcept { return data_; }

 private:
  void* data_ = nullptr;
  std::int64_t size_ = 0;
  DType dtype_ = DType::kFloat32;
};

/// Threads and scratch. Used by one thread at a time; two contexts share nothing.
class MARLINQ_API CpuContext {
 public:
  /// `threads` 0: as many as the process may run on.
  explicit CpuContext(int threads = 0);
  CpuContext(CpuContext&&) noexcept;
  CpuContext& operator=(CpuContext&&) noexcept;
  ~CpuContext();

  Device device() const noexcept { return {}; }
  int threads() const noexcept;
  /// How often the scratch has grown.
  std::int64_t scratch_allocations() const noexcept;

  ContextState& state() noexcept { return *state_; }

 private:
  std::unique_ptr<ContextState> state_;
};

}  // namespace cpu

/// GPTQ layers on the CPU, through the best kernel that the machine can run.
struct MARLINQ_API CpuBackend : QuantMarlinDefaults<CpuBackend> {
  static constexpr std::string_view kName = "cpu";
  using Context = cpu::CpuContext;
  using Buffer = cpu::CpuBuffer;
  using Packed = cpu::PackedExperts;

  static std::unique_ptr<Linear<CpuBackend>> load_gptq(Context& context, const GptqTensors& tensors,
                                                       const GptqSpec& spec,
                                                       const LoadOptions& options = {});
  static std::shared_ptr<MarlinExpertStack<CpuBackend>> load_gptq_stacked(
      Context& context, std::span<const GptqTensors> experts, const GptqSpec& spec,
      const LoadOptions& options = {});
  /// As ContextHandle::peak_rate.
  static double peak_rate(Context& context, const LoadOptions& options);

  static void pregrow_marlin_gather_scratch(Context& context, std::int64_t required_elements);
  static std::unique_ptr<MoeBlock<CpuBackend>> make_moe_block(
      Context& context, const MoeBlockParts<CpuBackend>& parts);
  static void route(Context& context, const ConstMatrixView& logits, const RouteOptions& options,
                    const MatrixView& ids, const MatrixView& weights);
  static void moe_align_block_size(Context& context, const ConstMatrixView& topk_ids,
                                   int block_size, int num_experts,
                                   const ConstArrayView& expert_map,
                                   const ArrayView& sorted_token_ids, const ArrayView& expert_ids,
                                   const ArrayView& num_tokens_past_padded);
  static Buffer allocate(Context& context, DType dtype, std::int64_t size);
  static void copy(Context& context, const ConstMatrixView& from, const MatrixView& to);
  static void synchronise(Context&) {}

  // For the registry.
  static BackendInfo info();
  static bool runs(DeviceKind kind) noexcept { return kind == DeviceKind::kCpu; }
  static Context open(Device device, const ContextOptions& options);

  // The primitives of PackedGemm and MoePrimitives, for the code in the core.
  static std::shared_ptr<const Packed> pack(Context& context, std::span<const GptqWeights> experts,
                                            const LoadOptions& options);
  static Description describe(const Packed& packed);
  static Description describe(const Packed& packed, std::int64_t expert);
  static void gemm(Context& context, const Packed& packed, std::int64_t expert,
                   const ConstMatrixView& input, const MatrixView& output, std::int64_t m);
  static void gemm_batched(Context& context, const Packed& packed, const ConstMatrixView& input,
                           std::span<const ExpertDispatch> dispatches, const MatrixView& output);
  static void gemm_fused(Context& context, const Packed& packed, const ConstMatrixView& input,
                         const FusedTiles& tiles, const MatrixView& output);
  static MatrixView moe_scratch(Context& context, MoeScratch slot, std::int64_t rows,
                                std::int64_t cols);
  static FusedTiles moe_align(Context& context, const ConstMatrixView& topk_ids,
                              std::int64_t num_experts);
  static void moe_activate(Context& context, Activation activation, const ConstMatrixView& gate_up,
                           const MatrixView& hidden);
  static void moe_scale_rows(Context& context, const ConstMatrixView& x,
                             const ConstMatrixView& weights, const MatrixView& scaled);
  static void moe_combine(Context& context, const MoeCombine& combine, const MatrixView& output);
};

using CpuLinear = Linear<CpuBackend>;

static_assert(BackendQuantMarlin<CpuBackend>);

}  // namespace marlinq
