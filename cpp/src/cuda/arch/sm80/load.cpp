#include "cuda/arch/sm80/load.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "cuda/arch/sm80/pack.hpp"
#include "cuda/arch/sm80/pack_plan.hpp"
#include "cuda/cuda_check.hpp"

namespace marlinq::cuda::sm80 {
namespace {

// Kernels divide a group's scale by the one before. Between these bounds a quotient stays below
// 2^60, and a sum in units of any scale far from overflow. float16 scales are always between 2^-24
// and 2^16.
bool scales_divide(std::span<const GptqWeights> experts, const SegmentPlan& segment) {
  constexpr float kLeast = 0x1p-30F;
  constexpr float kMost = 0x1p30F;
  const auto divide = [](const ValidatedModule& part) {
    return part.most_scale == 0.0F || (part.least_scale >= kLeast && part.most_scale <= kMost);
  };
  return std::ranges::all_of(experts, [&](const GptqWeights& weights) {
    return std::ranges::all_of(segment.modules,
                               [&](std::size_t module) { return divide(weights.modules[module]); });
  });
}

const std::int32_t* ints(const unsigned char* memory, std::int64_t place) {
  return place < 0 ? nullptr : reinterpret_cast<const std::int32_t*>(memory + place);
}

// Pieces that end inside a block of features or-in their codes, so that all start from 0.
void pack_experts(std::span<const GptqWeights> experts, const std::vector<LayerPlan>& plans,
                  DeviceWeight& target, LayerUpload& upload) {
  auto* memory = static_cast<unsigned char*>(target.memory.data());
  const auto bytes = static_cast<std::size_t>(target.memory.size()) * 4;
  MARLINQ_CUDA_CHECK(cudaMemsetAsync(memory, 0, bytes, upload.stream()));
  for (std::size_t e = 0; e < experts.size(); ++e) {
    unsigned char* const slot = memory + static_cast<std::int64_t>(e) * target.expert_bytes;
    for (const SegmentPlan& segment : plans[e].segments) {
      const std::vector<unsigned char> parts = host_parts(experts[e], segment);
      upload.put(slot + segment.places.chunk_groups, parts.data(),
                 static_cast<std::int64_t>(parts.size()));
    }
  }
  while (const DevicePiece* piece = upload.next()) {
    const GptqWeights& weights = experts[piece->raw.layer];
    const LayerPlan& plan = plans[piece->raw.layer];
    const std::vector<std::int32_t>& raw_group = segment_of(plan, piece->raw.module).raw_group;
    if (piece->raw.table != 0) {
      upload.put(piece->memory + piece->raw.table, raw_group.data(),
                 static_cast<std::int64_t>(raw_group.size()) * 4);
    }
    unsigned char* const slot =
        memory + static_cast<std::int64_t>(piece->raw.layer) * target.expert_bytes;
    pack_piece(place_piece(weights, plan, piece->raw, piece->memory, slot), upload.stream());
  }
}

Segment view_segment(std::span<const GptqWeights> experts, const SegmentPlan& s,
                     const unsigned char* memory) {
  return {.view = {.codes = reinterpret_cast<const std::uint32_t*>(memory + s.places.codes),
                   .groups = memory + s.places.groups,
                   .chunk_groups = ints(memory, s.places.chunk_groups),
                   .chunk_shift = s.chunk_shift,
                   .step_shift = s.step_shift,
                   .bias = reinterpret_cast<const float*>(ints(memory, s.places.bias)),
                   .source = ints(memory, s.places.source),
                   .scale_type = s.scale_type,
                   .code_bits = s.layout.code_bits,
                   .middle = 1 << (experts.front().bits - 1),
                   .record_bytes = s.layout.record_bytes(),
                   .has_zeros = s.layout.has_zeros,
                   .scales_divide = scales_divide(experts, s),
                   .n = static_cast<std::int32_t>(s.layout.n),
                   .k = static_cast<std::int32_t>(experts.front().k),
                   .chunks = static_cast<std::int32_t>(s.layout.chunks),
                   .num_groups = static_cast<std::int32_t>(s.layout.groups),
                   .groups_per_chunk = s.groups_per_chunk},
          .first_feature = s.first_feature};
}

}  // namespace

DeviceWeight load(std::span<const GptqWeights> experts, LayerUpload& upload) {
  const std::vector<LayerPlan> plans = plan_experts(experts);
  DeviceWeight result;
  result.experts = static_cast<std::int64_t>(experts.size());
  result.expert_bytes = plans.front().bytes;
  result.memory =
      CudaBuffer(upload.device(), DType::kInt32, result.experts * result.expert_bytes / 4);
  const auto* memory = static_cast<const unsigned char*>(result.memory.data());
  for (const SegmentPlan& segment : plans.front().segments) {
    result.segments.push_back(view_segment(experts, segment, memory));
    result.k_padded = std::max(result.k_padded, segment.layout.chunks * Layout::kChunkRows);
    result.n_padded += segment.layout.blocks() * Layout::kBlockFeatures;
  }
  try {
    pack_experts(experts, plans, result, upload);
    result.ready = upload.finish();
  } catch (...) {
    upload.abandon();  // before the memory goes
    throw;
  }
  return result;
}

}  // namespace marlinq::cuda::sm80
