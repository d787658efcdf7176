// The CUDA backend for typed use: CudaBackend::load_gptq(context, ...) and what it needs.
// No CUDA header is needed: a stream crosses as void*.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "marlinq/backend.hpp"
#include "marlinq/export.hpp"
#include "marlinq/registry.hpp"

namespace marlinq {
namespace cuda {

struct ContextState;
class PackedExperts;

/// Device memory. Movable, not copyable; contents start undefined.
class MARLINQ_API CudaBuffer {
 public:
  CudaBuffer() = default;
  /// Throws out_of_memory or device.
  CudaBuffer(int device, DType dtype, std::int64_t size);
  CudaBuffer(CudaBuffer&& other) noexcept;
  CudaBuffer& operator=(CudaBuffer&& other) noexcept;
  ~CudaBuffer();

  Device device() const noexcept { return {DeviceKind::kCuda, device_}; }
  DType dtype() const noexcept { return dtype_; }
  std::int64_t size() const noexcept { return size_; }  // elements
  void* data() const noexcept { return data_; }

 private:
  void* data_ = nullptr;
  std::int64_t size_ = 0;
  DType dtype_ = DType::kFloat32;
  int device_ = 0;
};

/// A device, a stream that the caller owns, and scratch. Used by one thread at a time. The first load
/// gives it streams, threads and memory of its own for loading, which the next ones use: at most 32 MB
/// of the device and 16 MB of pinned memory.
class MARLINQ_API CudaContext {
 public:
  /// Throws device where there is no such device.
  explicit CudaContext(int device = 0, void* stream = nullptr);
  CudaContext(CudaContext&&) noexcept;
  CudaContext& operator=(CudaContext&&) noexcept;
  ~CudaContext();

  Device device() const noexcept;
  void* stream() const noexcept;
  /// Work of later calls goes to this stream. The scratch is shared by all streams of a context, so
  /// the caller orders them.
  void set_stream(void* stream) noexcept;
  int threads() const noexcept;
  /// How often the scratch has grown.
  std::int64_t scratch_allocations() const noexcept;

  ContextState& state() noexcept { return *state_; }

 private:
  std::unique_ptr<ContextState> state_;
};

}  // namespace cuda

/// GPTQ layers on NVIDIA GPUs of compute capability 8.0 and newer.
struct MARLINQ_API CudaBackend : QuantMarlinDefaults<CudaBackend> {
  static constexpr std::string_view kName = "cuda";
  using Context = cuda::CudaContext;
  using Buffer = cuda::CudaBuffer;
  using Packed = cuda::PackedExperts;

  static std::unique_ptr<Linear<CudaBackend>> load_gptq(Context& context,
                                                        const GptqTensors& tensors,
                                                        const GptqSpec& spec,
                                                        const LoadOptions& options = {});
  static std::shared_ptr<MarlinExpertStack<CudaBackend>> load_gptq_stacked(
      Context& context, std::span<const GptqTensors> experts, const GptqSpec& spec,
      const LoadOptions& options = {});
  static void pregrow_marlin_gather_scratch(Context& context, std::int64_t required_elements);
  static std::unique_ptr<MoeBlock<CudaBackend>> make_moe_block(
      Context& context, const MoeBlockParts<CudaBackend>& parts);
  /// A correction bias travels in the kernel's parameters: nothing is uploaded, and a captured graph
  /// keeps it.
  static void route(Context& context, const ConstMatrixView& logits, const RouteOptions& options,
                    const MatrixView& ids, const MatrixView& weights);
  /// An expert_map in host memory travels likewise.
  static void moe_align_block_size(Context& context, const ConstMatrixView& topk_ids,
                                   int block_size, int num_experts,
                                   const ConstArrayView& expert_map,
                                   const ArrayView& sorted_token_ids, const ArrayView& expert_ids,
                                   const ArrayView& num_tokens_past_padded);
  static Buffer allocate(Context& context, DType dtype, std::int64_t size);
  static void copy(Context& context, const ConstMatrixView& from, const MatrixView& to);
  static void synchronise(Context& context);
  static bool captured(Context& context) noexcept;
  static std::vector<TunedSchedule> tune(Context& context, const Linear<CudaBackend>& linear,
                                         std::span<const std::int64_t> rows, DType dtype);

  // For the registry.
  static BackendInfo info();
  static bool runs(DeviceKind kind) noexcept { return kind == DeviceKind::kCuda; }
  static Context open(Device device, const ContextOptions& options);

  // The primitives of PackedGemm, for the code in the core.
  static Description describe(const Packed& packed);
  static Description describe(const Packed& packed, std::int64_t expert);
  static void gemm(Context& context, const Packed& packed, std::int64_t expert,
                   const ConstMatrixView& input, const MatrixView& output, std::int64_t m);
  static void gemm_batched(Context& context, const Packed& packed, const ConstMatrixView& input,
                           std::span<const ExpertDispatch> dispatches, const MatrixView& output);
  static void gemm_fused(Context& context, const Packed& packed, const ConstMatrixView& input,
                         const FusedTiles& tiles, const MatrixView& output);
};

static_assert(BackendQuantMarlin<CudaBackend>);

}  // namespace marlinq
