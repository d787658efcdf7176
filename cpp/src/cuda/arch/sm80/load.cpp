#include "cuda/arch/sm80/load.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/codes.hpp"
#include "core/elements.hpp"
#include "cuda/arch/sm80/pack.hpp"
#include "cuda/arch/sm80/pack_plan.hpp"
#include "cuda/cuda_check.hpp"

namespace marlinq::cuda::sm80 {
namespace {

// Device copies of host arrays for the time of a load.
class Uploads {
 public:
  explicit Uploads(cudaStream_t stream) : stream_(stream) {
    MARLINQ_CUDA_CHECK(cudaGetDevice(&device_));
  }

  const void* put(const void* data, std::size_t bytes) {
    buffers_.emplace_back(device_, DType::kInt32, static_cast<std::int64_t>((bytes + 3) / 4));
    copy(buffers_.back().data(), data, bytes);
    return buffers_.back().data();
  }
  const std::int32_t* put(const std::vector<std::int32_t>& values) {
    return static_cast<const std::int32_t*>(put(values.data(), values.size() * 4));
  }
  void copy(void* target, const void* data, std::size_t bytes) {
    MARLINQ_CUDA_CHECK(cudaMemcpyAsync(target, data, bytes, cudaMemcpyHostToDevice, stream_));
  }

 private:
  cudaStream_t stream_;
  int device_ = 0;
  std::vector<CudaBuffer> buffers_;
};

RawModule upload(const GptqWeights& weights, const ValidatedModule& part, std::int64_t first,
                 Uploads& uploads) {
  const auto words = static_cast<std::size_t>(packed_words(weights.k, weights.bits) * part.n);
  const auto zero_words =
      static_cast<std::size_t>(packed_words(part.n, weights.bits) * weights.groups);
  const auto scale_bytes =
      static_cast<std::size_t>(weights.groups * part.n) * size_of(part.scale_dtype);
  RawModule raw{.qweight = static_cast<const std::uint32_t*>(uploads.put(part.qweight, words * 4)),
                .qzeros = nullptr,
                .scales = uploads.put(part.scales, scale_bytes),
                .bits = weights.bits,
                .add_one = part.zero_points == ZeroPoints::kV1 ? 1 : 0,
                .n = part.n,
                .first_feature = first};
  if (part.qzeros != nullptr && !part.symmetric) {
    raw.qzeros = static_cast<const std::uint32_t*>(uploads.put(part.qzeros, zero_words * 4));
  }
  return raw;
}

}  // namespace

DeviceWeight load(const GptqWeights& weights, void* stream_pointer) {
  auto* stream = static_cast<cudaStream_t>(stream_pointer);
  const LayerPlan plan = plan_layer(weights);
  int device = 0;
  MARLINQ_CUDA_CHECK(cudaGetDevice(&device));
  DeviceWeight result;
  result.memory = CudaBuffer(device, DType::kInt32, plan.bytes / 4);
  auto* memory = static_cast<unsigned char*>(result.memory.data());
  MARLINQ_CUDA_CHECK(cudaMemsetAsync(memory, 0, static_cast<std::size_t>(plan.bytes), stream));
  Uploads uploads(stream);
  std::vector<std::int32_t> spread(plan.segments.size(), 0);
  auto* spread_flags =
      static_cast<std::int32_t*>(const_cast<void*>(uploads.put(spread.data(), spread.size() * 4)));
  for (std::size_t i = 0; i < plan.segments.size(); ++i) {
    const SegmentPlan& s = plan.segments[i];
    const PackTables tables{.source = uploads.put(s.source),
                            .step_group = uploads.put(s.step_group),
                            .raw_group = uploads.put(s.raw_group)};
    auto* codes = reinterpret_cast<std::uint32_t*>(memory + s.places.codes);
    auto* groups = memory + s.places.groups;
    uploads.copy(memory + s.places.chunk_groups, s.chunk_groups.data(),
                 s.chunk_groups.size() * 4);
    if (!s.identity) uploads.copy(memory + s.places.source, s.source.data(), s.source.size() * 4);
    std::vector<float> bias(s.places.bias >= 0 ? static_cast<std::size_t>(s.layout.n) : 0);
    std::int64_t feature = 0;
    for (const std::size_t module : s.modules) {
      const ValidatedModule& part = weights.modules[module];
      pack_module(upload(weights, part, feature, uploads), s, tables, codes, groups,
                  spread_flags + i, stream);
      for (std::int64_t column = 0; part.bias != nullptr && column < part.n; ++column) {
        bias[static_cast<std::size_t>(feature + column)] =
            read_float(part.bias, part.bias_dtype, column);
      }
      feature += part.n;
    }
    if (!bias.empty()) uploads.copy(memory + s.places.bias, bias.data(), bias.size() * 4);
    MARLINQ_CUDA_CHECK(cudaMemcpyAsync(&spread[i], spread_flags + i, 4, cudaMemcpyDeviceToHost,
                                       stream));
    MARLINQ_CUDA_CHECK(cudaStreamSynchronize(stream));
    const auto table = [memory](std::int64_t place) {
      return place < 0 ? nullptr : reinterpret_cast<const std::int32_t*>(memory + place);
    };
    result.segments.push_back(
        {.view = {.codes = codes,
                  .groups = groups,
                  .chunk_groups = table(s.places.chunk_groups),
                  .chunk_shift = s.chunk_shift,
                  .bias = reinterpret_cast<const float*>(table(s.places.bias)),
                  .source = table(s.places.source),
                  .scale_type = s.scale_type,
                  .code_bits = s.layout.code_bits,
                  .middle = 1 << (weights.bits - 1),
                  .record_bytes = s.layout.record_bytes(),
                  .has_zeros = s.layout.has_zeros,
                  .scales_divide = spread[i] == 0,
                  .n = static_cast<std::int32_t>(s.layout.n),
                  .k = static_cast<std::int32_t>(weights.k),
                  .chunks = static_cast<std::int32_t>(s.layout.chunks),
                  .num_groups = static_cast<std::int32_t>(s.layout.groups),
                  .groups_per_chunk = s.groups_per_chunk},
         .first_feature = s.first_feature});
    result.k_padded =
        std::max(result.k_padded, s.layout.chunks * Layout::kChunkRows);
    result.n_padded += s.layout.blocks() * Layout::kBlockFeatures;
  }
  return result;
}

}  // namespace marlinq::cuda::sm80
