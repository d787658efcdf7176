#include "cuda/arch/sm80/load.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "core/integers.hpp"
#include "cuda/arch/sm80/pack.hpp"
#include "cuda/arch/sm80/pack_plan.hpp"
#include "cuda/cuda_check.hpp"

namespace marlinq::cuda::sm80 {
namespace {

// Kernels divide a group's scale by the one before. Between these bounds a quotient stays below
// 2^60, and a sum in units of any scale far from overflow. float16 scales are always between 2^-24
// and 2^16.
bool scales_divide(const ValidatedModule& part) {
  constexpr float kLeast = 0x1p-30F;
  constexpr float kMost = 0x1p30F;
  return part.most_scale == 0.0F || (part.least_scale >= kLeast && part.most_scale <= kMost);
}

// Codes are at most 255, and kernels multiply scales by up to 512 first.
bool has_small_scales(const ValidatedModule& part) { return part.most_scale <= 64.0F; }

bool all_modules(std::span<const GptqWeights> experts, const SegmentPlan& segment,
                 bool (*holds)(const ValidatedModule&)) {
  return std::ranges::all_of(experts, [&](const GptqWeights& weights) {
    return std::ranges::all_of(segment.modules,
                               [&](std::size_t module) { return holds(weights.modules[module]); });
  });
}

bool are_halves(const ValidatedModule& part) {
  return has_as_half(part.least_scale, part.most_scale);
}

const std::int32_t* ints(const unsigned char* memory, std::int64_t place) {
  return place < 0 ? nullptr : reinterpret_cast<const std::int32_t*>(memory + place);
}

// The plans of the experts of a stack: as that of the first, for as long as its layout serves, or of a
// layout that all of them have been looked at for.
class Plans {
 public:
  explicit Plans(LayersToLoad& experts) : experts_(experts) {
    plans_.push_back(plan_layer(experts.with_zero_points(0)));
  }

  /// Looks at all experts, so that of() never fails.
  void plan_all() { plans_ = plan_experts(experts_.with_row_orders()); }

  const LayerPlan& first() const noexcept { return plans_.front(); }

  /// Null where the layout does not serve. Holds until the next call.
  const LayerPlan* of(std::size_t expert) {
    if (expert == 0 || plans_.size() > 1) return &plans_[expert];
    if (expert == latest_) return latest_plan();
    const GptqWeights& weights = experts_.with_zero_points(expert);
    const GptqWeights& model = experts_.structure(0);
    latest_ = expert;
    own_.reset();
    latest_serves_ = true;
    latest_is_model_ =
        std::ranges::equal(weights.modules, model.modules, {}, &ValidatedModule::group_of_row,
                           &ValidatedModule::group_of_row);
    if (latest_is_model_) {
      for (const SegmentPlan& segment : first().segments) {
        const bool symmetric = std::ranges::all_of(
            segment.modules, [&](std::size_t module) { return weights.modules[module].symmetric; });
        latest_serves_ = latest_serves_ && (symmetric || segment.layout.has_zeros);
      }
      experts_.drop_row_order(expert);
    } else {
      own_ = plan_like(first(), weights);
    }
    return latest_plan();
  }

  /// Whether the expert that of() was last asked for has the tables of the first one.
  bool has_first_tables() const noexcept { return plans_.size() == 1 && latest_is_model_; }

 private:
  const LayerPlan* latest_plan() const noexcept {
    if (!latest_is_model_) return own_ ? &*own_ : nullptr;
    return latest_serves_ ? &first() : nullptr;
  }

  LayersToLoad& experts_;
  std::vector<LayerPlan> plans_;
  std::size_t latest_ = 0;
  bool latest_is_model_ = true;
  bool latest_serves_ = true;
  std::optional<LayerPlan> own_;
};

void put_tables(const GptqWeights& weights, const LayerPlan& plan, unsigned char* slot,
                LayerUpload& upload, std::int64_t slots, std::int64_t slot_bytes) {
  for (const SegmentPlan& segment : plan.segments) {
    const std::vector<unsigned char> parts = host_parts(weights, segment);
    upload.put(slot + segment.places.chunk_groups, parts.data(),
               static_cast<std::int64_t>(parts.size()), slots, slot_bytes);
  }
}

bool has_bias(const GptqWeights& weights) {
  return std::ranges::any_of(weights.modules,
                             [](const ValidatedModule& module) { return module.bias != nullptr; });
}

// Pieces that end inside a block of features or-in their codes, so that these start from 0; and so does
// what no piece writes: chunks that only other experts need, and what lies between the parts.
void clear(const GptqWeights& model, const LayerPlan& plan, const DeviceWeight& target,
           cudaStream_t stream) {
  auto* memory = static_cast<unsigned char*>(target.memory.data());
  for (const SegmentPlan& segment : plan.segments) {
    const bool all_written = segment.layout.chunks == ceil_div(model.k, Layout::kChunkRows) &&
                             std::ranges::all_of(segment.modules, [&](std::size_t module) {
                               return model.modules[module].n % Layout::kBlockFeatures == 0;
                             });
    const std::int64_t first = all_written ? segment.places.groups : segment.places.codes;
    MARLINQ_CUDA_CHECK(cudaMemset2DAsync(memory + first,
                                         static_cast<std::size_t>(target.expert_bytes), 0,
                                         static_cast<std::size_t>(segment.places.end - first),
                                         static_cast<std::size_t>(target.experts), stream));
  }
}

// False if some expert needs another layout.
bool pack_experts(LayersToLoad& experts, Plans& plans, DeviceWeight& target, LayerUpload& upload) {
  auto* memory = static_cast<unsigned char*>(target.memory.data());
  clear(experts.structure(0), plans.first(), target, upload.stream());
  const bool own_tables = has_bias(experts.structure(0));
  put_tables(experts.structure(0), plans.first(), memory, upload, own_tables ? 1 : target.experts,
             target.expert_bytes);
  std::size_t tables = 1;  // experts whose tables are on their way
  std::vector<PieceToPack> batch;
  while (const DevicePieces* pieces = upload.next()) {
    batch.clear();
    for (const RawPiece& raw : pieces->raw) {
      const LayerPlan* plan = plans.of(raw.layer);
      if (plan == nullptr) return false;
      const GptqWeights& weights = experts.structure(raw.layer);
      unsigned char* const slot =
          memory + static_cast<std::int64_t>(raw.layer) * target.expert_bytes;
      if (raw.layer == tables) {
        if (own_tables || !plans.has_first_tables()) put_tables(weights, *plan, slot, upload, 1, 0);
        ++tables;
      }
      if (raw.table != 0) {
        const std::vector<std::int32_t>& raw_group = segment_of(*plan, raw.module).raw_group;
        upload.put(pieces->memory + raw.table, raw_group.data(),
                   static_cast<std::int64_t>(raw_group.size()) * 4);
      }
      batch.push_back(place_piece(weights, *plan, raw, pieces->memory, slot));
    }
    pack_pieces(batch, upload.stream());
  }
  return true;
}

// The type that scales have in the end: kernels have the least to ask of float16.
FloatType settle_scales(LayersToLoad& experts, const SegmentPlan& s, const DeviceWeight& target,
                        cudaStream_t stream) {
  if (s.scale_type != FloatType::kBF16 || !all_modules(experts.checked(), s, are_halves))
    return s.scale_type;
  convert_scales({.records = static_cast<unsigned char*>(target.memory.data()) + s.places.groups,
                  .count = s.layout.blocks() * s.layout.groups * Layout::kBlockStrips,
                  .record_bytes = s.layout.record_bytes(),
                  .weights = target.experts,
                  .weight_bytes = target.expert_bytes},
                 stream);
  return FloatType::kF16;
}

Segment view_segment(std::span<const GptqWeights> experts, const SegmentPlan& s,
                     FloatType scale_type, const unsigned char* memory) {
  return {.view = {.codes = reinterpret_cast<const std::uint32_t*>(memory + s.places.codes),
                   .groups = memory + s.places.groups,
                   .chunk_groups = ints(memory, s.places.chunk_groups),
                   .chunk_shift = s.chunk_shift,
                   .step_shift = s.step_shift,
                   .bias = reinterpret_cast<const float*>(ints(memory, s.places.bias)),
                   .source = ints(memory, s.places.source),
                   .scale_type = scale_type,
                   .code_bits = s.layout.code_bits,
                   .middle = 1 << (experts.front().bits - 1),
                   .record_bytes = s.layout.record_bytes(),
                   .has_zeros = s.layout.has_zeros,
                   .small_scales = all_modules(experts, s, has_small_scales),
                   .scales_divide = all_modules(experts, s, scales_divide),
                   .n = static_cast<std::int32_t>(s.layout.n),
                   .k = static_cast<std::int32_t>(experts.front().k),
                   .chunks = static_cast<std::int32_t>(s.layout.chunks),
                   .num_groups = static_cast<std::int32_t>(s.layout.groups),
                   .groups_per_chunk = s.groups_per_chunk},
          .first_feature = s.first_feature,
          .schedules = {}};
}

void allocate(DeviceWeight& target, const LayerPlan& plan, int device) {
  target.memory = CudaBuffer();  // first, so that both are never held at once
  target.expert_bytes = plan.bytes;
  target.memory = CudaBuffer(device, DType::kInt32, target.experts * target.expert_bytes / 4);
}

}  // namespace

DeviceWeight load(LayersToLoad& experts, LayerUpload& upload) {
  DeviceWeight result;
  result.experts = static_cast<std::int64_t>(experts.size());
  Plans plans(experts);
  std::vector<FloatType> scale_types;  // of the segments
  try {
    allocate(result, plans.first(), upload.device());
    if (!pack_experts(experts, plans, result, upload)) {
      plans.plan_all();
      upload.start_again();
      allocate(result, plans.first(), upload.device());
      (void)pack_experts(experts, plans, result, upload);
    }
    for (const SegmentPlan& segment : plans.first().segments)
      scale_types.push_back(settle_scales(experts, segment, result, upload.stream()));
    result.ready = upload.finish();
  } catch (...) {
    upload.abandon();  // before the memory goes
    throw;
  }
  const auto* memory = static_cast<const unsigned char*>(result.memory.data());
  for (std::size_t i = 0; i < scale_types.size(); ++i) {
    const SegmentPlan& segment = plans.first().segments[i];
    result.segments.push_back(view_segment(experts.checked(), segment, scale_types[i], memory));
    result.k_padded = std::max(result.k_padded, segment.layout.chunks * Layout::kChunkRows);
    result.n_padded += segment.layout.blocks() * Layout::kBlockFeatures;
  }
  return result;
}

}  // namespace marlinq::cuda::sm80
