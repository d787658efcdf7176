// The handles: every call goes once through the erased interface.
#include "marlinq/handle.hpp"

#include "runtime/erased.hpp"

namespace marlinq {

using detail::guarded;

Device BufferHandle::device() const noexcept { return self_->device(); }
DType BufferHandle::dtype() const noexcept { return self_->dtype(); }
std::int64_t BufferHandle::size() const noexcept { return self_->size(); }
void* BufferHandle::data() const noexcept { return self_->data(); }

std::string_view LinearHandle::backend() const noexcept { return self_->backend(); }
std::int64_t LinearHandle::in_features() const noexcept { return self_->in_features(); }
std::int64_t LinearHandle::out_features() const noexcept { return self_->out_features(); }
Description LinearHandle::describe() const { return self_->describe(); }
void LinearHandle::forward(const ContextHandle& context, const ConstMatrixView& input,
                           const MatrixView& output, std::int64_t m) const {
  guarded([&] { self_->forward(context.any(), input, output, m); });
}
void LinearHandle::forward_host(const ContextHandle& context, const ConstMatrixView& input,
                                const MatrixView& output, std::int64_t m) const {
  guarded([&] { self_->forward_host(context.any(), input, output, m); });
}

std::string_view ExpertStackHandle::backend() const noexcept { return self_->backend(); }
std::int64_t ExpertStackHandle::num_experts() const noexcept { return self_->num_experts(); }
std::int64_t ExpertStackHandle::k() const noexcept { return self_->k(); }
std::int64_t ExpertStackHandle::n_per_expert() const noexcept { return self_->n_per_expert(); }
Description ExpertStackHandle::describe() const { return self_->describe(); }
LinearHandle ExpertStackHandle::expert(std::int64_t index) const { return self_->expert(index); }
void ExpertStackHandle::gemm_phase_batched(const ContextHandle& context,
                                           const ConstMatrixView& input,
                                           std::span<const ExpertDispatch> dispatches,
                                           const MatrixView& output) const {
  guarded([&] { self_->gemm_phase_batched(context.any(), input, dispatches, output); });
}
void ExpertStackHandle::gemm_phase_fused(const ContextHandle& context, const ConstMatrixView& input,
                                         const FusedTiles& tiles, const MatrixView& output) const {
  guarded([&] { self_->gemm_phase_fused(context.any(), input, tiles, output); });
}
void ExpertStackHandle::gemm_phase_batched_host(const ContextHandle& context,
                                                const ConstMatrixView& input,
                                                std::span<const ExpertDispatch> dispatches,
                                                const MatrixView& output) const {
  guarded([&] { self_->gemm_phase_batched_host(context.any(), input, dispatches, output); });
}
void ExpertStackHandle::gemm_phase_fused_host(const ContextHandle& context,
                                              const ConstMatrixView& input, const FusedTiles& tiles,
                                              const MatrixView& output) const {
  guarded([&] { self_->gemm_phase_fused_host(context.any(), input, tiles, output); });
}

std::string_view MoeBlockHandle::backend() const noexcept { return self_->backend(); }
std::int64_t MoeBlockHandle::hidden_size() const noexcept { return self_->hidden_size(); }
std::int64_t MoeBlockHandle::num_experts() const noexcept { return self_->num_experts(); }
void MoeBlockHandle::forward(const ContextHandle& context, const MoeInput& input,
                             const MatrixView& output) const {
  guarded([&] { self_->forward(context.any(), input, output); });
}
void MoeBlockHandle::forward_host(const ContextHandle& context, const MoeInput& input,
                                  const MatrixView& output) const {
  guarded([&] { self_->forward_host(context.any(), input, output); });
}

std::string_view ContextHandle::backend() const noexcept { return self_->backend(); }
Device ContextHandle::device() const { return self_->device(); }
int ContextHandle::threads() const { return self_->threads(); }
void* ContextHandle::stream() const { return self_->stream(); }
std::int64_t ContextHandle::scratch_allocations() const { return self_->scratch_allocations(); }
double ContextHandle::peak_rate(const LoadOptions& options) const {
  return guarded([&] { return self_->peak_rate(options); });
}
LinearHandle ContextHandle::load_gptq(const GptqTensors& tensors, const GptqSpec& spec,
                                      const LoadOptions& options) const {
  return guarded([&] { return self_->load_gptq(tensors, spec, options); });
}
ExpertStackHandle ContextHandle::load_gptq_stacked(std::span<const GptqTensors> experts,
                                                   const GptqSpec& spec,
                                                   const LoadOptions& options) const {
  return guarded([&] { return self_->load_gptq_stacked(experts, spec, options); });
}
MoeBlockHandle ContextHandle::make_moe_block(const MoeBlockSpec& spec) const {
  return guarded([&] { return self_->make_moe_block(spec); });
}
void ContextHandle::pregrow_marlin_gather_scratch(std::int64_t required_elements) const {
  guarded([&] { self_->pregrow_marlin_gather_scratch(required_elements); });
}
void ContextHandle::route(const ConstMatrixView& logits, const RouteOptions& options,
                          const MatrixView& ids, const MatrixView& weights) const {
  guarded([&] { self_->route(logits, options, ids, weights); });
}
void ContextHandle::moe_align_block_size(const ConstMatrixView& topk_ids, int block_size,
                                         int num_experts, const ConstArrayView& expert_map,
                                         const ArrayView& sorted_token_ids,
                                         const ArrayView& expert_ids,
                                         const ArrayView& num_tokens_past_padded) const {
  guarded([&] {
    self_->moe_align_block_size(topk_ids, block_size, num_experts, expert_map, sorted_token_ids,
                                expert_ids, num_tokens_past_padded);
  });
}
BufferHandle ContextHandle::allocate(DType dtype, std::int64_t size) const {
  return guarded([&] { return self_->allocate(dtype, size); });
}
void ContextHandle::copy(const ConstMatrixView& from, const MatrixView& to) const {
  guarded([&] { self_->copy(from, to); });
}
void ContextHandle::synchronise() const {
  guarded([&] { self_->synchronise(); });
}
bool ContextHandle::captured() const { return self_->captured(); }
std::vector<TunedSchedule> ContextHandle::tune(const LinearHandle& linear,
                                               std::span<const std::int64_t> rows,
                                               DType dtype) const {
  return guarded([&] { return self_->tune(linear.any(), rows, dtype); });
}

}  // namespace marlinq
