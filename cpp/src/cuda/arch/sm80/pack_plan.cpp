#include "cuda/arch/sm80/pack_plan.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <utility>

#include "core/concat.hpp"
#include "core/elements.hpp"
#include "core/integers.hpp"
#include "core/row_order.hpp"
#include "marlinq/error.hpp"

namespace marlinq::cuda::sm80 {
namespace {

FloatType float_type(DType dtype) noexcept {
  return dtype == DType::kFloat16    ? FloatType::kF16
         : dtype == DType::kBFloat16 ? FloatType::kBF16
                                     : FloatType::kF32;
}

/// The shift that takes every chunk to its group; -1 where there is none.
std::int32_t find_chunk_shift(const std::vector<std::int32_t>& chunk_groups) {
  constexpr std::int32_t kMostShift = 24;  // of chunks that kernels count
  for (std::int32_t shift = 0; shift <= kMostShift; ++shift) {
    bool fits = true;
    for (std::size_t chunk = 0; fits && chunk < chunk_groups.size(); ++chunk) {
      fits = chunk_groups[chunk] == static_cast<std::int32_t>(chunk >> shift) << 4;
    }
    if (fits) return shift;
  }
  return -1;
}

/// The same for every step. One group is a long one, however few rows it has: a short one would round each of few weights.
std::int32_t find_step_shift(const std::vector<std::int32_t>& step_group) {
  constexpr std::int32_t kMostShift = 26;
  if (step_group.back() == 0) return kMostShift;
  for (std::int32_t shift = 0; shift <= kMostShift; ++shift) {
    bool fits = true;
    for (std::size_t step = 0; fits && step < step_group.size(); ++step) {
      fits = step_group[step] == static_cast<std::int32_t>(step >> shift);
    }
    if (fits) return shift;
  }
  return -1;
}

SegmentPlan start_segment(const GptqWeights& weights, const ValidatedModule& part) {
  SegmentPlan plan;
  RowOrder order = make_row_order(part.group_of_row, weights.groups, Layout::kGroupAlignment,
                                  Layout::kGroupAlignment);
  plan.step_group.reserve(order.blocks.size() + Layout::kChunkSteps);
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
  plan.chunk_groups.reserve(plan.step_group.size() / Layout::kChunkSteps);
  for (std::size_t step = 0; step < plan.step_group.size(); step += Layout::kChunkSteps) {
    std::int32_t groups[Layout::kChunkSteps];
    std::copy_n(plan.step_group.begin() + static_cast<std::ptrdiff_t>(step), Layout::kChunkSteps,
                groups);
    plan.chunk_groups.push_back(chunk_groups_word(groups));
    plan.groups_per_chunk =
        std::max(plan.groups_per_chunk, groups[Layout::kChunkSteps - 1] - groups[0] + 1);
  }
  plan.chunk_shift = find_chunk_shift(plan.chunk_groups);
  plan.step_shift = find_step_shift(plan.step_group);
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

namespace {

// Whether a module goes on with the segment of the one before it.
bool joins(const GptqWeights& weights, std::size_t module) {
  if (module == 0) return false;
  const ValidatedModule& part = weights.modules[module];
  const ValidatedModule& before = weights.modules[module - 1];
  return part.group_of_row == before.group_of_row && part.scale_dtype == before.scale_dtype;
}

LayerPlan cut_segments(const GptqWeights& weights, const std::vector<bool>& starts) {
  LayerPlan layer;
  std::int64_t feature = 0;
  for (std::size_t i = 0; i < weights.modules.size(); ++i) {
    const ValidatedModule& part = weights.modules[i];
    if (starts[i]) {
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
  return layer;
}

// What one of a segment's experts needs, all of them have.
void share_layout(std::vector<LayerPlan>& experts, std::size_t index) {
  SegmentPlan most = experts.front().segments[index];
  for (const LayerPlan& expert : experts) {
    const SegmentPlan& s = expert.segments[index];
    // The groups of chunks that some experts do not have are no quotient of their number.
    if (s.chunk_shift != most.chunk_shift || s.layout.chunks != most.layout.chunks)
      most.chunk_shift = -1;
    if (s.step_shift != most.step_shift || s.layout.chunks != most.layout.chunks)
      most.step_shift = -1;
    most.layout.chunks = std::max(most.layout.chunks, s.layout.chunks);
    most.layout.groups = std::max(most.layout.groups, s.layout.groups);
    most.layout.has_zeros = most.layout.has_zeros || s.layout.has_zeros;
    most.groups_per_chunk = std::max(most.groups_per_chunk, s.groups_per_chunk);
    most.has_source = most.has_source || !s.identity;
    most.places.bias = std::max(most.places.bias, s.places.bias);
  }
  const auto chunks = static_cast<std::size_t>(most.layout.chunks);
  for (LayerPlan& expert : experts) {
    SegmentPlan& s = expert.segments[index];
    s.layout = most.layout;
    s.groups_per_chunk = most.groups_per_chunk;
    s.chunk_shift = most.chunk_shift;
    s.step_shift = most.step_shift;
    s.has_source = most.has_source;
    s.places.bias = most.places.bias;
    s.source.resize(chunks * Layout::kChunkRows, -1);
    s.step_group.resize(chunks * Layout::kChunkSteps, s.step_group.back());
    s.chunk_groups.resize(chunks, s.step_group.back() << 4);
  }
}

void place_parts(LayerPlan& layer) {
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
    if (s.has_source) s.places.source = reserve(static_cast<std::int64_t>(s.source.size()) * 4);
    if (s.places.bias >= 0) s.places.bias = reserve(s.layout.n * 4);
    s.places.end = layer.bytes;
  }
}

}  // namespace

std::vector<LayerPlan> plan_experts(std::span<const GptqWeights> experts) {
  std::vector<bool> starts(experts.front().modules.size(), false);
  for (const GptqWeights& weights : experts) {
    for (std::size_t i = 0; i < starts.size(); ++i) starts[i] = starts[i] || !joins(weights, i);
  }
  std::vector<LayerPlan> plans;
  plans.reserve(experts.size());
  for (const GptqWeights& weights : experts) plans.push_back(cut_segments(weights, starts));
  for (std::size_t i = 0; i < plans.front().segments.size(); ++i) share_layout(plans, i);
  for (LayerPlan& plan : plans) place_parts(plan);
  return plans;
}

std::optional<LayerPlan> plan_like(const LayerPlan& model, const GptqWeights& weights) {
  std::vector<bool> starts(weights.modules.size(), false);
  for (const SegmentPlan& segment : model.segments) starts[segment.modules.front()] = true;
  for (std::size_t i = 0; i < starts.size(); ++i) {
    if (!starts[i] && !joins(weights, i)) return std::nullopt;
  }
  std::vector<LayerPlan> both = {model, cut_segments(weights, starts)};
  for (std::size_t i = 0; i < model.segments.size(); ++i) {
    share_layout(both, i);
    if (both.front().segments[i] != model.segments[i]) return std::nullopt;
  }
  place_parts(both.back());
  return std::move(both.back());
}

LayerPlan plan_layer(const GptqWeights& weights) {
  return std::move(plan_experts({&weights, 1}).front());
}

const SegmentPlan& segment_of(const LayerPlan& plan, std::size_t module) {
  std::size_t segment = 0;
  while (plan.segments[segment].modules.back() < module) ++segment;
  return plan.segments[segment];
}

std::vector<unsigned char> host_parts(const GptqWeights& weights, const SegmentPlan& segment) {
  const SegmentPlaces& places = segment.places;
  std::vector<unsigned char> bytes(static_cast<std::size_t>(places.end - places.chunk_groups));
  const auto put = [&](std::int64_t place, const auto& values) {
    std::memcpy(bytes.data() + (place - places.chunk_groups), values.data(), values.size() * 4);
  };
  put(places.chunk_groups, segment.chunk_groups);
  if (places.source >= 0) put(places.source, segment.source);
  if (places.bias < 0) return bytes;
  std::vector<float> bias;
  bias.reserve(static_cast<std::size_t>(segment.layout.n));
  for (const std::size_t module : segment.modules) {
    const ValidatedModule& part = weights.modules[module];
    for (std::int64_t column = 0; column < part.n; ++column) {
      bias.push_back(part.bias == nullptr ? 0.0F : read_float(part.bias, part.bias_dtype, column));
    }
  }
  put(places.bias, bias);
  return bytes;
}

PieceToPack place_piece(const GptqWeights& weights, const LayerPlan& plan, const RawPiece& raw,
                        const unsigned char* staged, unsigned char* memory) {
  const ValidatedModule& part = weights.modules[raw.module];
  const SegmentPlan& segment = segment_of(plan, raw.module);
  std::int64_t first_feature = raw.first_column;
  for (const std::size_t module : segment.modules) {
    if (module < raw.module) first_feature += weights.modules[module].n;
  }
  const bool all_rows = raw.rows == weights.k;
  if (!all_rows && !segment.identity) {
    throw Error(ErrorCode::kInternal,
                concat(part.name, ": some rows came to be packed, but their order is not plain"));
  }
  const auto words = [](const unsigned char* address) {
    return reinterpret_cast<const std::uint32_t*>(address);
  };
  const auto table = [](const unsigned char* base, std::int64_t place, bool present) {
    return present ? reinterpret_cast<const std::int32_t*>(base + place) : nullptr;
  };
  const bool has_zeros = raw.qzeros.rows != 0 && !part.symmetric;
  return {
      .qweight = words(staged + raw.qweight.offset),
      .qzeros = has_zeros ? words(staged + raw.qzeros.offset) : nullptr,
      .scales = staged + raw.scales.offset,
      .scale_type = segment.scale_type,
      .bits = weights.bits,
      .zero_add = part.zero_points == ZeroPoints::kV2 ? 0U
                  : weights.bits == 3                 ? 1U
                                                      : 0xFFFFFFFFU / ((1U << weights.bits) - 1U),
      .columns = static_cast<std::int32_t>(raw.columns),
      .words = static_cast<std::uint32_t>(raw.qweight.rows),
      .first_row = static_cast<std::int32_t>(raw.first_row),
      .first_raw_group = raw.first_group,
      .layout = segment.layout,
      .k = static_cast<std::int32_t>(weights.k),
      .source = table(memory, segment.places.source, !segment.identity),
      .chunk_groups = table(memory, segment.places.chunk_groups, true),
      .raw_group = table(staged, raw.table, raw.table != 0),
      .codes = reinterpret_cast<std::uint32_t*>(memory + segment.places.codes),
      .groups = memory + segment.places.groups,
      .first_feature = first_feature,
      .first_chunk = raw.first_row / Layout::kChunkRows,
      .chunks = all_rows ? segment.layout.chunks : ceil_div(raw.rows, Layout::kChunkRows),
      .first_group = all_rows ? 0 : raw.first_group,
      .num_groups = all_rows ? static_cast<std::int64_t>(segment.raw_group.size()) : raw.groups};
}

}  // namespace marlinq::cuda::sm80
