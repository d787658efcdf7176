// Type-erased handles: what C++ servers and the Python module hold, whatever the backend.
// A handle is copyable, immutable and cheap to pass; a context handle is used by one thread at a
// time.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "marlinq/export.hpp"
#include "marlinq/gptq.hpp"
#include "marlinq/linear.hpp"
#include "marlinq/load_options.hpp"
#include "marlinq/moe_block.hpp"
#include "marlinq/routing.hpp"
#include "marlinq/schedules.hpp"
#include "marlinq/types.hpp"

namespace marlinq {

namespace detail {
class AnyBuffer;
class AnyContext;
class AnyLinear;
class AnyExpertStack;
class AnyMoeBlock;
}  // namespace detail

class ContextHandle;

/// Memory on a device, freed with its last handle.
class MARLINQ_API BufferHandle {
 public:
  explicit BufferHandle(std::shared_ptr<detail::AnyBuffer> self) : self_(std::move(self)) {}

  Device device() const noexcept;
  DType dtype() const noexcept;
  std::int64_t size() const noexcept;  // elements
  void* data() const noexcept;

 private:
  std::shared_ptr<detail::AnyBuffer> self_;
};

/// A loaded linear layer; see Linear<B>.
class MARLINQ_API LinearHandle {
 public:
  explicit LinearHandle(std::shared_ptr<const detail::AnyLinear> self) : self_(std::move(self)) {}

  std::string_view backend() const noexcept;
  std::int64_t in_features() const noexcept;
  std::int64_t out_features() const noexcept;
  Description describe() const;

  /// As Linear<B>::forward. Throws invalid_argument also for a context of another backend.
  void forward(const ContextHandle& context, const ConstMatrixView& input, const MatrixView& output,
               std::int64_t m) const;

  /// As forward, for views of which one or both are of host memory, whatever the layer's device:
  /// copies them to buffers of the context and back. Waits for the context's stream, before and
  /// after, so that it cannot be captured in a graph. On the CPU it is forward.
  void forward_host(const ContextHandle& context, const ConstMatrixView& input,
                    const MatrixView& output, std::int64_t m) const;

  const detail::AnyLinear& any() const noexcept { return *self_; }

 private:
  std::shared_ptr<const detail::AnyLinear> self_;
};

/// A loaded stack of experts; see MarlinExpertStack<B>.
class MARLINQ_API ExpertStackHandle {
 public:
  explicit ExpertStackHandle(std::shared_ptr<const detail::AnyExpertStack> self)
      : self_(std::move(self)) {}

  std::string_view backend() const noexcept;
  std::int64_t num_experts() const noexcept;
  std::int64_t k() const noexcept;
  std::int64_t n_per_expert() const noexcept;
  Description describe() const;

  LinearHandle expert(std::int64_t index) const;
  void gemm_phase_batched(const ContextHandle& context, const ConstMatrixView& input,
                          std::span<const ExpertDispatch> dispatches,
                          const MatrixView& output) const;
  void gemm_phase_fused(const ContextHandle& context, const ConstMatrixView& input,
                        const FusedTiles& tiles, const MatrixView& output) const;

  /// As the two above, for views of which any may be of host memory; otherwise like
  /// LinearHandle::forward_host. Tiles in host memory are checked there: invalid_argument for ids
  /// that do not fit.
  void gemm_phase_batched_host(const ContextHandle& context, const ConstMatrixView& input,
                               std::span<const ExpertDispatch> dispatches,
                               const MatrixView& output) const;
  void gemm_phase_fused_host(const ContextHandle& context, const ConstMatrixView& input,
                             const FusedTiles& tiles, const MatrixView& output) const;

  const detail::AnyExpertStack& any() const noexcept { return *self_; }

 private:
  std::shared_ptr<const detail::AnyExpertStack> self_;
};

/// A mixture-of-experts block; see MoeBlock<B>.
class MARLINQ_API MoeBlockHandle {
 public:
  explicit MoeBlockHandle(std::shared_ptr<const detail::AnyMoeBlock> self)
      : self_(std::move(self)) {}

  std::string_view backend() const noexcept;
  std::int64_t hidden_size() const noexcept;
  std::int64_t num_experts() const noexcept;

  void forward(const ContextHandle& context, const MoeInput& input, const MatrixView& output) const;

  /// As forward, for views of which any may be of host memory; otherwise like
  /// LinearHandle::forward_host. Ids in host memory are checked there.
  void forward_host(const ContextHandle& context, const MoeInput& input,
                    const MatrixView& output) const;

 private:
  std::shared_ptr<const detail::AnyMoeBlock> self_;
};

/// MoeBlockParts over handles.
struct MoeBlockSpec {
  ExpertStackHandle gate_up;
  ExpertStackHandle down;
  Activation activation = Activation::kSilu;
  RouterWeight router_weight = RouterWeight::kOnOutput;
  std::optional<LinearHandle> shared_gate_up;  // both or neither
  std::optional<LinearHandle> shared_down;
  std::vector<float> shared_gate;
};

/// Device, stream and scratch. Make one per thread with open_context(). A context that took part in
/// the capture of a CUDA graph owns memory that the graph uses, and has to outlive it.
class MARLINQ_API ContextHandle {
 public:
  explicit ContextHandle(std::shared_ptr<detail::AnyContext> self) : self_(std::move(self)) {}

  std::string_view backend() const noexcept;
  Device device() const;
  int threads() const;   // host threads that a forward uses
  void* stream() const;  // a CUDA stream; null: the default stream, or none

  /// The loaders throw invalid_argument, unsupported or out_of_memory, and change nothing then.
  LinearHandle load_gptq(const GptqTensors& tensors, const GptqSpec& spec,
                         const LoadOptions& options = {}) const;
  ExpertStackHandle load_gptq_stacked(std::span<const GptqTensors> experts, const GptqSpec& spec,
                                      const LoadOptions& options = {}) const;
  MoeBlockHandle make_moe_block(const MoeBlockSpec& spec) const;

  void pregrow_marlin_gather_scratch(std::int64_t required_elements) const;
  void route(const ConstMatrixView& logits, const RouteOptions& options, const MatrixView& ids,
             const MatrixView& weights) const;
  /// As QuantMarlinDefaults<B>::moe_align_block_size: tiles of topk_ids [T, top_k] in memory of the
  /// context's device. `expert_map` is there or in host memory; size 0: none.
  void moe_align_block_size(const ConstMatrixView& topk_ids, int block_size, int num_experts,
                            const ConstArrayView& expert_map, const ArrayView& sorted_token_ids,
                            const ArrayView& expert_ids,
                            const ArrayView& num_tokens_past_padded) const;

  /// Zeroed memory on the context's device. Throws out_of_memory.
  BufferHandle allocate(DType dtype, std::int64_t size) const;
  /// Appends a copy of all rows to the stream. Both matrices are of one size and dtype, each in host
  /// memory or on the context's device; where one is in host memory, the copy is done on return.
  void copy(const ConstMatrixView& from, const MatrixView& to) const;
  /// Returns when the work of the context's stream is done. Throws invalid_argument while the stream
  /// is being captured.
  void synchronise() const;
  /// Whether work of this context was captured in a CUDA graph, which it has to outlive then.
  bool captured() const;

  /// How often this context's scratch has grown. A repeated size never changes it.
  std::int64_t scratch_allocations() const;

  /// Operations a second, a product and its sum being two, that the arithmetic of a layer loaded with
  /// these options cannot pass: its inner instructions on registers alone, on all threads of the
  /// context, measured for some 10 ms. 0 where the backend does not measure it. Throws as load_gptq
  /// for a kernel that there is not.
  double peak_rate(const LoadOptions& options) const;

  /// As QuantMarlinDefaults<B>::tune. Throws invalid_argument also for a layer of another backend.
  std::vector<TunedSchedule> tune(const LinearHandle& linear, std::span<const std::int64_t> rows,
                                  DType dtype) const;

  detail::AnyContext& any() const noexcept { return *self_; }

 private:
  std::shared_ptr<detail::AnyContext> self_;
};

}  // namespace marlinq
