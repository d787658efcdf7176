// The CUDA backend's side of the trait.
#include "marlinq/cuda/cuda_backend.hpp"

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/marlin_linear.hpp"
#include "cuda/arch_table.hpp"
#include "cuda/context.hpp"
#include "cuda/cuda_check.hpp"
#include "cuda/layers_to_load.hpp"
#include "cuda/moe/block.hpp"
#include "cuda/packed.hpp"
#include "cuda/products.hpp"

namespace marlinq {
namespace cuda {
namespace {

// Kernels count rows in 32 bits.
void check_rows_fit(std::int64_t rows, std::string_view name) {
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  if (rows > kMost) refuse_argument(concat(name, ": ", rows, " rows, expected at most ", kMost));
}

std::string layer_name(const GptqWeights& weights) {
  std::string name;
  for (const ValidatedModule& module : weights.modules) {
    if (!module.name.empty()) name += (name.empty() ? "" : " + ") + module.name;
  }
  return name.empty() ? "layer" : name;
}

// An error for want of memory names what was loaded.
template <class F>
DeviceWeight named(std::string_view name, F&& load) {
  try {
    return load();
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kOutOfMemory) throw;
    throw Error(ErrorCode::kOutOfMemory, concat(name, ": ", error.what()), error.where());
  }
}

const ArchKernels& arch_for(const ContextState& state, const LoadOptions& options) {
  if (options.compute != Compute::kAuto) {
    throw Error(ErrorCode::kUnsupported,
                concat("backend 'cuda' does not support compute '", to_string(options.compute),
                       "'; activations decide between float16 and bfloat16"));
  }
  return choose_arch(options.kernel, state.limits.capability);
}

// The tensors are on their way while their values are looked at.
std::shared_ptr<const PackedExperts> load_experts(ContextState& state,
                                                  std::span<const GptqTensors> tensors,
                                                  const GptqSpec& spec,
                                                  const LoadOptions& options) {
  const ArchKernels& arch = arch_for(state, options);
  LayersToLoad layers(tensors, spec);
  const DeviceGuard guard(state.device);
  const RelaxedCapture relaxed;
  DeviceWeight packed = named(layer_name(layers.structure(0)), [&] {
    LayerUpload upload(state.uploads(), layers);
    return arch.pack(layers, upload);
  });
  return std::make_shared<const PackedExperts>(std::move(packed), arch, layers.checked(),
                                               state.limits, options);
}

}  // namespace
}  // namespace cuda

static_assert(PackedGemm<CudaBackend>);

std::unique_ptr<Linear<CudaBackend>> CudaBackend::load_gptq(Context& context,
                                                            const GptqTensors& tensors,
                                                            const GptqSpec& spec,
                                                            const LoadOptions& options) {
  return std::make_unique<MarlinLinear<CudaBackend>>(
      cuda::load_experts(context.state(), {&tensors, 1}, spec, options), 0);
}

std::shared_ptr<MarlinExpertStack<CudaBackend>> CudaBackend::load_gptq_stacked(
    Context& context, std::span<const GptqTensors> experts, const GptqSpec& spec,
    const LoadOptions& options) {
  return std::make_shared<MarlinExpertStackImpl<CudaBackend>>(
      cuda::load_experts(context.state(), experts, spec, options));
}

Description CudaBackend::describe(const Packed& packed) { return packed.description(); }

Description CudaBackend::describe(const Packed& packed, std::int64_t expert) {
  return packed.description(expert);
}

void CudaBackend::gemm(Context& context, const Packed& packed, std::int64_t expert,
                       const ConstMatrixView& input, const MatrixView& output, std::int64_t m) {
  cuda::run_rows(context.state(), packed, expert, input, output, m);
}

void CudaBackend::gemm_batched(Context& context, const Packed& packed, const ConstMatrixView& input,
                               std::span<const ExpertDispatch> dispatches,
                               const MatrixView& output) {
  cuda::check_rows_fit(input.rows, "x");
  cuda::check_rows_fit(output.rows, "out");
  std::vector<cuda::ExpertRows> rows;
  rows.reserve(dispatches.size());
  for (const ExpertDispatch& dispatch : dispatches) {
    if (dispatch.rows == 0) continue;
    rows.push_back({.expert = dispatch.expert,
                    .input_row = static_cast<std::int32_t>(dispatch.input_row),
                    .output_row = static_cast<std::int32_t>(dispatch.output_row),
                    .rows = static_cast<std::int32_t>(dispatch.rows)});
  }
  // The dispatches of a launch are parameters of its kernel.
  const std::size_t most = static_cast<std::size_t>(packed.arch().most_dispatches);
  for (std::size_t first = 0; first < rows.size(); first += most) {
    cuda::run_phase(
        context.state(), packed,
        {.x = cuda::float_matrix(input),
         .x_rows = input.rows,
         .dispatches = std::span(rows).subspan(first, std::min(most, rows.size() - first)),
         .y = cuda::float_output(output)});
  }
}

void CudaBackend::gemm_fused(Context& context, const Packed& packed, const ConstMatrixView& input,
                             const FusedTiles& tiles, const MatrixView& output) {
  const auto ints = [](const ConstArrayView& view) {
    return static_cast<const std::int32_t*>(view.data);
  };
  const std::int64_t listed =
      std::min(tiles.expert_ids.size, tiles.sorted_token_ids.size / tiles.block_size);
  if (listed == 0) return;
  cuda::check_rows_fit(listed * tiles.block_size, "sorted_token_ids");
  cuda::run_phase(
      context.state(), packed,
      {.x = cuda::float_matrix(input),
       .x_rows = tiles.num_tokens,
       .tiles = {.experts = ints(tiles.expert_ids),
                 .ids = ints(tiles.sorted_token_ids),
                 .used = ints(tiles.num_tokens_past_padded),
                 .tile_rows = tiles.block_size,
                 .most_tiles = static_cast<std::int32_t>(listed),
                 .most_slots = listed * tiles.block_size,
                 .num_ids = static_cast<std::int32_t>(tiles.num_tokens * tiles.top_k)},
       .top_k = tiles.top_k,
       .y = cuda::float_output(output),
       .weights =
           tiles.topk_weights ? static_cast<const float*>(tiles.topk_weights->data) : nullptr,
       .weights_stride = tiles.top_k});
}

std::unique_ptr<MoeBlock<CudaBackend>> CudaBackend::make_moe_block(
    Context& context, const MoeBlockParts<CudaBackend>& parts) {
  return cuda::make_block(context.state(), parts);
}

CudaBackend::Context CudaBackend::open(Device device, const ContextOptions& options) {
  return Context(device.index, options.stream);
}

}  // namespace marlinq
