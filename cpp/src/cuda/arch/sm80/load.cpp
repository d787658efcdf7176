#include "cuda/arch/sm80/load.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/elements.hpp"
#include "core/refuse.hpp"
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

// What of a segment the host makes: chunk_groups, source and bias, which stand together behind
// codes and groups.
std::vector<unsigned char> host_parts(const GptqWeights& weights, const SegmentPlan& segment) {
  const SegmentPlaces& places = segment.places;
  const std::int64_t begin = places.chunk_groups;
  std::vector<unsigned char> bytes(static_cast<std::size_t>(places.end - begin));
  const auto put = [&bytes, begin](std::int64_t place, const auto& values) {
    std::memcpy(bytes.data() + (place - begin), values.data(), values.size() * 4);
  };
  put(places.chunk_groups, segment.chunk_groups);
  if (places.source >= 0) put(places.source, segment.source);
  if (places.bias < 0) return bytes;
  std::vector<float> bias(static_cast<std::size_t>(segment.layout.n));
  std::size_t feature = 0;
  for (const std::size_t module : segment.modules) {
    const ValidatedModule& part = weights.modules[module];
    for (std::int64_t column = 0; part.bias != nullptr && column < part.n; ++column) {
      bias[feature + static_cast<std::size_t>(column)] =
          read_float(part.bias, part.bias_dtype, column);
    }
    feature += static_cast<std::size_t>(part.n);
  }
  put(places.bias, bias);
  return bytes;
}

// Where a module stands in its layer.
struct ModulePlace {
  const SegmentPlan* segment = nullptr;
  std::int64_t first_feature = 0;  // of the segment
};

std::vector<ModulePlace> module_places(const GptqWeights& weights, const LayerPlan& plan) {
  std::vector<ModulePlace> places;
  for (const SegmentPlan& segment : plan.segments) {
    std::int64_t feature = 0;
    for (const std::size_t module : segment.modules) {
      places.push_back({.segment = &segment, .first_feature = feature});
      feature += weights.modules[module].n;
    }
  }
  return places;
}

const std::int32_t* ints(const unsigned char* memory, std::int64_t place) {
  return place < 0 ? nullptr : reinterpret_cast<const std::int32_t*>(memory + place);
}

PieceToPack place_piece(const GptqWeights& weights, const DevicePiece& piece,
                        const ModulePlace& place, unsigned char* memory) {
  const RawPiece& raw = piece.raw;
  const ValidatedModule& part = weights.modules[raw.module];
  const SegmentPlan& segment = *place.segment;
  const bool all_rows = raw.rows == weights.k;
  return {.qweight = piece.qweight,
          .qzeros = part.symmetric ? nullptr : piece.qzeros,
          .scales = piece.scales,
          .scale_type = segment.scale_type,
          .bits = weights.bits,
          .zero_add = part.zero_points == ZeroPoints::kV2 ? 0U
                      : weights.bits == 3 ? 1U
                                          : 0xFFFFFFFFU / ((1U << weights.bits) - 1U),
          .columns = static_cast<std::int32_t>(raw.columns),
          .words = static_cast<std::uint32_t>(raw.qweight.rows),
          .first_row = static_cast<std::int32_t>(raw.first_row),
          .first_raw_group = raw.first_group,
          .layout = segment.layout,
          .k = static_cast<std::int32_t>(weights.k),
          .source = ints(memory, segment.places.source),
          .chunk_groups = ints(memory, segment.places.chunk_groups),
          .raw_group = piece.table,
          .codes = reinterpret_cast<std::uint32_t*>(memory + segment.places.codes),
          .groups = memory + segment.places.groups,
          .first_feature = place.first_feature + raw.first_column,
          .first_chunk = raw.first_row / Layout::kChunkRows,
          .chunks = all_rows ? segment.layout.chunks : ceil_div(raw.rows, Layout::kChunkRows),
          .first_group = all_rows ? 0 : raw.first_group,
          .num_groups = all_rows ? segment.layout.groups : raw.groups};
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
  const std::vector<ModulePlace> places = module_places(weights, plan);
  while (const DevicePiece* piece = upload.next()) {
    const SegmentPlan& segment = *places[piece->raw.module].segment;
    if (piece->table != nullptr) {
      upload.put(piece->table, segment.raw_group.data(),
                 static_cast<std::int64_t>(segment.raw_group.size()) * 4);
    }
    if (piece->raw.rows != weights.k && !segment.identity) {
      throw Error(ErrorCode::kInternal,
                  "sm80: some of the rows came, but their order is not plain");
    }
    pack_piece(place_piece(weights, *piece, places[piece->raw.module], memory), upload.stream());
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
