#include "cuda/arch/sm80/load.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/arch/sm80/pack.hpp"
#include "cuda/arch/sm80/pack_plan.hpp"
#include "cuda/cuda_check.hpp"

namespace marlinq::cuda::sm80 {
namespace {

// Kernels divide a group's scale by the one before. Between these bounds a quotient stays below
// 2^60, and a sum in units of any scale far from overflow. float16 scales are always between 2^-24
// and 2^16.
bool scales_divide(const GptqWeights& weights, const SegmentPlan& segment) {
  constexpr float kLeast = 0x1p-30F;
  constexpr float kMost = 0x1p30F;
  return std::ranges::all_of(segment.modules, [&weights](std::size_t module) {
    const ValidatedModule& part = weights.modules[module];
    return part.most_scale == 0.0F || (part.least_scale >= kLeast && part.most_scale <= kMost);
  });
}

const std::int32_t* ints(const unsigned char* memory, std::int64_t place) {
  return place < 0 ? nullptr : reinterpret_cast<const std::int32_t*>(memory + place);
}

void pack_layer(const GptqWeights& weights, const LayerPlan& plan, unsigned char* memory,
                LayerUpload& upload) {
  for (const SegmentPlan& segment : plan.segments) {
    const SegmentPlaces& places = segment.places;
    MARLINQ_CUDA_CHECK(cudaMemsetAsync(memory + places.codes, 0,
                                       static_cast<std::size_t>(places.chunk_groups - places.codes),
                                       upload.stream()));
    const std::vector<unsigned char> bytes = host_parts(weights, segment);
    upload.put(memory + places.chunk_groups, bytes.data(), static_cast<std::int64_t>(bytes.size()));
  }
  while (const DevicePiece* piece = upload.next()) {
    const std::vector<std::int32_t>& raw_group = segment_of(plan, piece->raw.module).raw_group;
    if (piece->raw.table != 0) {
      upload.put(piece->memory + piece->raw.table, raw_group.data(),
                 static_cast<std::int64_t>(raw_group.size()) * 4);
    }
    pack_piece(place_piece(weights, plan, piece->raw, piece->memory, memory), upload.stream());
  }
}

Segment view_segment(const GptqWeights& weights, const SegmentPlan& s,
                     const unsigned char* memory) {
  return {.view = {.codes = reinterpret_cast<const std::uint32_t*>(memory + s.places.codes),
                   .groups = memory + s.places.groups,
                   .chunk_groups = ints(memory, s.places.chunk_groups),
                   .chunk_shift = s.chunk_shift,
                   .bias = reinterpret_cast<const float*>(ints(memory, s.places.bias)),
                   .source = ints(memory, s.places.source),
                   .scale_type = s.scale_type,
                   .code_bits = s.layout.code_bits,
                   .middle = 1 << (weights.bits - 1),
                   .record_bytes = s.layout.record_bytes(),
                   .has_zeros = s.layout.has_zeros,
                   .scales_divide = scales_divide(weights, s),
                   .n = static_cast<std::int32_t>(s.layout.n),
                   .k = static_cast<std::int32_t>(weights.k),
                   .chunks = static_cast<std::int32_t>(s.layout.chunks),
                   .num_groups = static_cast<std::int32_t>(s.layout.groups),
                   .groups_per_chunk = s.groups_per_chunk},
          .first_feature = s.first_feature};
}

}  // namespace

DeviceWeight load(const GptqWeights& weights, LayerUpload& upload) {
  const LayerPlan plan = plan_layer(weights);
  DeviceWeight result;
  result.memory = CudaBuffer(upload.device(), DType::kInt32, plan.bytes / 4);
  auto* memory = static_cast<unsigned char*>(result.memory.data());
  for (const SegmentPlan& segment : plan.segments) {
    result.segments.push_back(view_segment(weights, segment, memory));
    result.k_padded = std::max(result.k_padded, segment.layout.chunks * Layout::kChunkRows);
    result.n_padded += segment.layout.blocks() * Layout::kBlockFeatures;
  }
  try {
    pack_layer(weights, plan, memory, upload);
    result.ready = upload.finish();
  } catch (...) {
    upload.abandon();  // before the memory goes
    throw;
  }
  return result;
}

}  // namespace marlinq::cuda::sm80
