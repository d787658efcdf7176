// Where the tensors of a layer go in the order of layout.hpp: pure host code.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "cuda/arch/sm80/layout.hpp"
#include "cuda/arch/sm80/pack_piece.hpp"
#include "cuda/problem.hpp"
#include "cuda/raw_pieces.hpp"
#include "marlinq/gptq.hpp"

namespace marlinq::cuda::sm80 {

/// Byte offsets of the parts of a segment in the layer's memory, in this order; -1: none.
struct SegmentPlaces {
  std::int64_t codes = 0;
  std::int64_t groups = 0;
  std::int64_t chunk_groups = 0;
  std::int64_t source = -1;
  std::int64_t bias = -1;
  std::int64_t end = 0;

  friend bool operator==(const SegmentPlaces&, const SegmentPlaces&) = default;
};

/// Modules that share one row order and one dtype of scales, fused to one range of features.
struct SegmentPlan {
  Layout layout;
  FloatType scale_type = FloatType::kF16;
  std::int64_t first_feature = 0;    // of the layer
  std::vector<std::size_t> modules;  // of the layer
  bool identity = true;              // packed row i is input row i
  bool has_source = false;           // some expert's are not, so that each has its table
  /// Input row of each packed row, -1 for padding.
  std::vector<std::int32_t> source;
  /// The checkpoint's number of each packed group.
  std::vector<std::int32_t> raw_group;
  /// Packed group of each step of 16 packed rows.
  std::vector<std::int32_t> step_group;
  std::vector<std::int32_t> chunk_groups;  // Layout's words
  std::int32_t groups_per_chunk = 1;       // at most
  std::int32_t chunk_shift = -1;           // as WeightView's, ...
  std::int32_t step_shift = -1;            // ... and this too
  SegmentPlaces places;

  friend bool operator==(const SegmentPlan&, const SegmentPlan&) = default;
};

struct LayerPlan {
  std::vector<SegmentPlan> segments;
  std::int64_t bytes = 0;  // of the layer's memory
};

LayerPlan plan_layer(const GptqWeights& weights);

/// The same for the experts of a stack, of one layout: each has the segments, chunks, groups and tables
/// that the neediest has, so that all take the same bytes and have their parts at the same places.
std::vector<LayerPlan> plan_experts(std::span<const GptqWeights> experts);

/// The plan of another expert of a stack in the layout of `model`; none where it needs more than that has.
std::optional<LayerPlan> plan_like(const LayerPlan& model, const GptqWeights& weights);

/// The segment that a module is part of.
const SegmentPlan& segment_of(const LayerPlan& plan, std::size_t module);

/// What of a segment's memory the host makes, from places.chunk_groups to its end.
std::vector<unsigned char> host_parts(const GptqWeights& weights, const SegmentPlan& segment);

/// How a piece whose tensors are at `staged` goes into the layer's `memory`. Where the piece has a
/// table, it holds the segment's raw_group.
PieceToPack place_piece(const GptqWeights& weights, const LayerPlan& plan, const RawPiece& raw,
                        const unsigned char* staged, unsigned char* memory);

}  // namespace marlinq::cuda::sm80
