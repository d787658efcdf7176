// The CPU backend's side of the trait: one-liners into the shared load path, and how calls become
// row groups.
#include "marlinq/cpu/cpu_backend.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "core/host_ids.hpp"
#include "core/load_gptq.hpp"
#include "core/moe_block_over_phases.hpp"
#include "cpu/context.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/features.hpp"
#include "cpu/gemm.hpp"
#include "cpu/packed.hpp"
#include "cpu/parallel.hpp"

namespace marlinq {

static_assert(PackedGemm<CpuBackend>);
static_assert(MoePrimitives<CpuBackend>);

std::unique_ptr<Linear<CpuBackend>> CpuBackend::load_gptq(Context& context,
                                                          const GptqTensors& tensors,
                                                          const GptqSpec& spec,
                                                          const LoadOptions& options) {
  return load_gptq_with<CpuBackend>(context, tensors, spec, options);
}

std::shared_ptr<MarlinExpertStack<CpuBackend>> CpuBackend::load_gptq_stacked(
    Context& context, std::span<const GptqTensors> experts, const GptqSpec& spec,
    const LoadOptions& options) {
  return load_gptq_stacked_with<CpuBackend>(context, experts, spec, options);
}

std::unique_ptr<MoeBlock<CpuBackend>> CpuBackend::make_moe_block(
    Context&, const MoeBlockParts<CpuBackend>& parts) {
  return std::make_unique<MoeBlockOverPhases<CpuBackend>>(parts);
}

double CpuBackend::peak_rate(Context& context, const LoadOptions& options) {
  const cpu::IsaKernels& isa = cpu::choose_isa(options.kernel);
  const auto saturate = cpu::arithmetic_of(isa, cpu::choose_compute(options.compute, isa)).saturate;
  constexpr std::int64_t kRounds = 20000;  // tens of microseconds
  constexpr int kTimes = 300;
  double best = 0.0;
  for (int i = 0; i < kTimes; ++i) {
    std::atomic<std::int64_t> products = 0;
    const auto start = std::chrono::steady_clock::now();
    cpu::parallel_parts(context.threads(), [&](int, int) { products += saturate(kRounds); });
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    best = std::max(best, 2.0 * static_cast<double>(products) / time.count());
  }
  return best;
}

void CpuBackend::pregrow_marlin_gather_scratch(Context& context, std::int64_t required_elements) {
  if (required_elements < 0) {
    refuse_argument(concat("required_elements: ", required_elements, ", expected at least 0"));
  }
  context.state().pregrow(required_elements);
}

void CpuBackend::route(Context&, const ConstMatrixView& logits, const RouteOptions& options,
                       const MatrixView& ids, const MatrixView& weights) {
  marlinq::route(logits, options, ids, weights);
}

CpuBackend::Buffer CpuBackend::allocate(Context&, DType dtype, std::int64_t size) {
  Buffer buffer(dtype, size);
  if (size > 0) std::memset(buffer.data(), 0, static_cast<std::size_t>(size) * size_of(dtype));
  return buffer;
}

void CpuBackend::copy(Context&, const ConstMatrixView& from, const MatrixView& to) {
  const auto size = static_cast<std::int64_t>(size_of(to.dtype));
  for (std::int64_t row = 0; row < to.rows; ++row) {
    std::memmove(static_cast<std::uint8_t*>(to.data) + row * to.row_stride * size,
                 static_cast<const std::uint8_t*>(from.data) + row * from.row_stride * size,
                 static_cast<std::size_t>(to.cols * size));
  }
}

BackendInfo CpuBackend::info() {
  BackendInfo info{.name = std::string(kName),
                   .devices = {to_string(Device{})},
                   .hardware = concat(cpu::host_name(), ", ", cpu::default_threads(), " threads"),
                   .kernels = {},
                   .compute = {}};
  for (const Compute compute :
       {Compute::kFloat32, Compute::kInt16, Compute::kBFloat16, Compute::kInt8}) {
    info.compute.emplace_back(to_string(compute));
  }
  const cpu::IsaKernels& chosen = cpu::choose_isa({});
  for (const cpu::IsaKernels* isa : cpu::isa_kernels()) {
    info.kernels.push_back({.name = isa->name,
                            .requires_features = cpu::feature_names(isa->required),
                            .usable = (isa->required & cpu::host_features()) == isa->required,
                            .chosen = isa == &chosen});
  }
  return info;
}

CpuBackend::Context CpuBackend::open(Device device, const ContextOptions& options) {
  if (device.index != 0) {
    throw Error(ErrorCode::kDevice,
                concat("device: cpu with index ", device.index, ", expected the one cpu, index 0"));
  }
  return Context(options.threads);
}

std::shared_ptr<const CpuBackend::Packed> CpuBackend::pack(Context& context,
                                                           std::span<const GptqWeights> experts,
                                                           const LoadOptions& options) {
  if (options.schedules != nullptr) {
    throw Error(ErrorCode::kUnsupported,
                "backend 'cpu' does not support schedules; its kernels have one each");
  }
  const cpu::IsaKernels& isa = cpu::choose_isa(options.kernel);
  return cpu::pack_experts(experts, isa, cpu::choose_compute(options.compute, isa),
                           context.threads());
}

Description CpuBackend::describe(const Packed& packed) { return packed.description(); }

Description CpuBackend::describe(const Packed& packed, std::int64_t expert) {
  return packed.description(expert);
}

void CpuBackend::gemm(Context& context, const Packed& packed, std::int64_t expert,
                      const ConstMatrixView& input, const MatrixView& output, std::int64_t m) {
  const ExpertDispatch all{.expert = static_cast<std::int32_t>(expert), .rows = m};
  gemm_batched(context, packed, input, {&all, 1}, output);
}

void CpuBackend::gemm_batched(Context& context, const Packed& packed, const ConstMatrixView& input,
                              std::span<const ExpertDispatch> dispatches,
                              const MatrixView& output) {
  cpu::ContextState& state = context.state();
  state.rows.clear();
  state.groups.clear();
  for (const ExpertDispatch& dispatch : dispatches) {
    if (dispatch.rows == 0) continue;
    state.groups.push_back({.expert = dispatch.expert,
                            .first = static_cast<std::int64_t>(state.rows.size()),
                            .count = dispatch.rows});
    for (std::int64_t row = 0; row < dispatch.rows; ++row) {
      state.rows.push_back(
          {.input = dispatch.input_row + row, .output = dispatch.output_row + row});
    }
  }
  if (!state.groups.empty()) cpu::run_row_groups(state, packed, input, output);
}

void CpuBackend::gemm_fused(Context& context, const Packed& packed, const ConstMatrixView& input,
                            const FusedTiles& tiles, const MatrixView& output) {
  const std::int64_t entries = checked_tile_entries(tiles);
  cpu::ContextState& state = context.state();
  state.rows.clear();
  state.groups.clear();
  state.zero_rows.clear();
  const std::int64_t ids = tiles.num_tokens * tiles.top_k;
  for (std::int64_t entry = 0; entry < entries; ++entry) {
    const std::int64_t expert =
        checked_tile_expert(tiles, entry / tiles.block_size, packed.num_experts());
    const std::int64_t id = checked_tile_id(tiles, entry);
    if (id >= ids) continue;  // padding
    if (expert < 0) {
      state.zero_rows.push_back(id);
      continue;
    }
    // Tiles of one expert that follow each other are one group of rows.
    if (state.groups.empty() || state.groups.back().expert != expert) {
      state.groups.push_back({.expert = static_cast<std::int32_t>(expert),
                              .first = static_cast<std::int64_t>(state.rows.size())});
    }
    ++state.groups.back().count;
    const float weight =
        tiles.topk_weights ? static_cast<const float*>(tiles.topk_weights->data)[id] : 1.0F;
    state.rows.push_back({.input = id / tiles.top_k, .output = id, .weight = weight});
  }
  const std::size_t element_size = size_of(output.dtype);
  for (const std::int64_t row : state.zero_rows) {
    const auto offset = static_cast<std::size_t>(row * output.row_stride) * element_size;
    std::memset(static_cast<std::uint8_t*>(output.data) + offset, 0,
                static_cast<std::size_t>(packed.n()) * element_size);
  }
  if (!state.groups.empty()) cpu::run_row_groups(state, packed, input, output);
}

}  // namespace marlinq
