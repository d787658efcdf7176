#include "cuda/arch/sm80/pack_plan.hpp"

#include <algorithm>
#include <utility>

#include "core/integers.hpp"
#include "core/row_order.hpp"

namespace marlinq::cuda::sm80 {
namespace {

FloatType float_type(DType dtype) noexcept {
  return dtype == DType::kFloat16    ? FloatType::kF16
         : dtype == DType::kBFloat16 ? FloatType::kBF16
                                     : FloatType::kF32;
}

/// The shift that takes every chunk to its group; -1 where there is none.
std::int32_t find_chunk_shift(const std::vector<std::int32_t>& chunk_groups) {
  constexpr std::int32_t kMostShift = 30;
  for (std::int32_t shift = 0; shift <= kMostShift; ++shift) {
    bool fits = true;
    for (std::size_t chunk = 0; fits && chunk < chunk_groups.size(); ++chunk) {
      fits = chunk_groups[chunk] == static_cast<std::int32_t>(chunk >> shift) << 4;
    }
    if (fits) return shift;
  }
  return -1;
}

SegmentPlan start_segment(const GptqWeights& weights, const ValidatedModule& part) {
  SegmentPlan plan;
  RowOrder order = make_row_order(part.group_of_row, weights.groups, Layout::kGroupAlignment,
                                  Layout::kGroupAlignment);
  for (const RowBlock& step : order.blocks) {
    if (plan.raw_group.empty() || plan.raw_group.back() != step.group)
      plan.raw_group.push_back(step.group);
    plan.step_group.push_back(static_cast<std::int32_t>(plan.raw_group.size()) - 1);
  }
  const std::int64_t rows = round_up(order.rows(), Layout::kChunkRows);
  plan.identity = order.identity;
  plan.source = std::move(order.source);
  plan.source.resize(static_cast<std::size_t>(rows), -1);
  plan.step_group.resize(static_cast<std::size_t>(rows / Layout::kGroupAlignment),
                         plan.step_group.back());
  for (std::size_t step = 0; step < plan.step_group.size(); step += Layout::kChunkSteps) {
    std::int32_t groups[Layout::kChunkSteps];
    std::copy_n(plan.step_group.begin() + static_cast<std::ptrdiff_t>(step), Layout::kChunkSteps,
                groups);
    plan.chunk_groups.push_back(chunk_groups_word(groups));
    plan.groups_per_chunk =
        std::max(plan.groups_per_chunk, groups[Layout::kChunkSteps - 1] - groups[0] + 1);
  }
  plan.chunk_shift = find_chunk_shift(plan.chunk_groups);
  plan.scale_type = float_type(part.scale_dtype);
  plan.layout = {.code_bits = weights.bits == 8 ? 8 : 4,
                 .scale_bytes = plan.scale_type == FloatType::kF32 ? 4 : 2,
                 .has_zeros = false,
                 .n = 0,
                 .chunks = rows / Layout::kChunkRows,
                 .groups = static_cast<std::int64_t>(plan.raw_group.size())};
  return plan;
}

}  // namespace

LayerPlan plan_layer(const GptqWeights& weights) {
  LayerPlan layer;
  std::int64_t feature = 0;
  for (std::size_t i = 0; i < weights.modules.size(); ++i) {
    const ValidatedModule& part = weights.modules[i];
    const bool joins = i > 0 && part.group_of_row == weights.modules[i - 1].group_of_row &&
                       part.scale_dtype == weights.modules[i - 1].scale_dtype;
    if (!joins) {
      layer.segments.push_back(start_segment(weights, part));
      layer.segments.back().first_feature = feature;
    }
    SegmentPlan& segment = layer.segments.back();
    segment.modules.push_back(i);
    segment.layout.n += part.n;
    segment.layout.has_zeros = segment.layout.has_zeros || !part.symmetric;
    if (part.bias != nullptr) segment.places.bias = 0;
    feature += part.n;
  }
  const auto reserve = [&layer](std::int64_t size) {
    constexpr std::int64_t kAlignment = 256;
    const std::int64_t at = layer.bytes;
    layer.bytes += round_up(size, kAlignment);
    return at;
  };
  for (SegmentPlan& s : layer.segments) {
    s.places.codes = reserve(s.layout.words() * 4);
    s.places.groups = reserve(s.layout.group_bytes());
    s.places.chunk_groups = reserve(static_cast<std::int64_t>(s.chunk_groups.size()) * 4);
    if (!s.identity) s.places.source = reserve(static_cast<std::int64_t>(s.source.size()) * 4);
    if (s.places.bias == 0) s.places.bias = reserve(s.layout.n * 4);
    s.places.end = layer.bytes;
  }
  return layer;
}

}  // namespace marlinq::cuda::sm80
