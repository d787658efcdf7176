// Routing on a CUDA device: the trait's functions.
#include <cstdint>

#include "core/routing.hpp"
#include "cuda/context.hpp"
#include "cuda/cuda_check.hpp"
#include "cuda/moe/align.hpp"
#include "cuda/moe/route.hpp"
#include "marlinq/cuda/cuda_backend.hpp"

namespace marlinq {
namespace {

constexpr std::int32_t kDependentLaunchCapability = 90;

}  // namespace

void CudaBackend::route(Context& context, const ConstMatrixView& logits,
                        const RouteOptions& options, const MatrixView& ids,
                        const MatrixView& weights) {
  check_route(logits, options, ids, weights, context.device());
  const cuda::ContextState& state = context.state();
  const cuda::DeviceGuard guard(state.device);
  cuda::route({.logits = cuda::float_matrix(logits),
               .tokens = logits.rows,
               .experts = static_cast<std::int32_t>(logits.cols),
               .ids = static_cast<std::int32_t*>(ids.data),
               .ids_stride = ids.row_stride,
               .weights = static_cast<float*>(weights.data),
               .weights_stride = weights.row_stride},
              options, state.limits.capability >= kDependentLaunchCapability, state.stream);
}

void CudaBackend::moe_align_block_size(Context& context, const ConstMatrixView& topk_ids,
                                       int block_size, int num_experts,
                                       const ConstArrayView& expert_map,
                                       const ArrayView& sorted_token_ids,
                                       const ArrayView& expert_ids,
                                       const ArrayView& num_tokens_past_padded) {
  check_align(topk_ids, block_size, num_experts, expert_map, sorted_token_ids, expert_ids,
              num_tokens_past_padded, context.device());
  const cuda::ContextState& state = context.state();
  const cuda::DeviceGuard guard(state.device);
  cuda::align_block_size(
      cuda::topk_ids_of(topk_ids), block_size, num_experts,
      {.data = expert_map.size == 0 ? nullptr : static_cast<const std::int32_t*>(expert_map.data),
       .on_host = expert_map.device.kind == DeviceKind::kCpu},
      {.sorted_token_ids = static_cast<std::int32_t*>(sorted_token_ids.data),
       .sorted_size = sorted_token_ids.size,
       .expert_ids = static_cast<std::int32_t*>(expert_ids.data),
       .expert_size = expert_ids.size,
       .num_tokens_past_padded = static_cast<std::int32_t*>(num_tokens_past_padded.data)},
      state.limits.capability >= kDependentLaunchCapability, state.stream);
}

}  // namespace marlinq
