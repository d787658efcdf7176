// Packs a layer on the device from its raw tensors, straight into the final buffer.
#include <cuda_runtime.h>

#include <cstring>
#include <memory>
#include <vector>

#include "core/codes.hpp"
#include "core/elements.hpp"
#include "core/row_order.hpp"
#include "cuda/arch/sm80/pack.hpp"
#include "cuda/cuda_check.hpp"

namespace marlinq::cuda::sm80 {
namespace {

constexpr int kThreads = 256;

// The raw tensors of one module on the device, and where its features start in the segment.
struct RawModule {
  const uint32_t* qweight;
  const uint32_t* qzeros;  // null: every zero point is 2^(b-1)
  const unsigned char* scales;
  int bits;
  int add_one;  // v1: zero points are stored minus 1
  int64_t n;
  int64_t first_feature;
};

__device__ __forceinline__ uint32_t read_code(const uint32_t* qweight, int bits, int64_t n,
                                              int64_t row, int64_t column) {
  const int64_t bit = row * bits;
  const int shift = static_cast<int>(bit % 32);
  uint32_t value = qweight[bit / 32 * n + column] >> shift;
  if (shift + bits > 32) value |= qweight[(bit / 32 + 1) * n + column] << (32 - shift);
  return value & ((1u << bits) - 1u);
}

// As core/codes.hpp: v1 adds the repeated 1 to the whole word, 3 bits go field by field.
__device__ __forceinline__ uint32_t read_zero(const RawModule& raw, int64_t group, int64_t column) {
  const uint32_t mask = (1u << raw.bits) - 1u;
  if (raw.qzeros == nullptr) return 1u << (raw.bits - 1);
  const uint32_t* words = raw.qzeros + group * ((raw.n * raw.bits + 31) / 32);
  const int64_t bit = column * raw.bits;
  const int shift = static_cast<int>(bit % 32);
  if (raw.bits == 3) {
    uint32_t value = words[bit / 32] >> shift;
    if (shift + 3 > 32) value |= words[bit / 32 + 1] << (32 - shift);
    return (value + raw.add_one) & mask;
  }
  return ((words[bit / 32] + raw.add_one * (0xFFFFFFFFu / mask)) >> shift) & mask;
}

// One thread a word of the final buffer.
__global__ void pack_codes(RawModule raw, Layout layout, const int32_t* source,
                           const int32_t* step_group, const int32_t* raw_group, uint32_t* codes,
                           int64_t first_strip, int64_t last_strip) {
  const int64_t per_strip = layout.chunks() * Layout::kLanes * 4;
  const int64_t index =
      first_strip * per_strip + blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= last_strip * per_strip) return;
  const int word = index % 4;
  const int lane = index / 4 % Layout::kLanes;
  const int64_t chunk = index / 4 / Layout::kLanes % layout.chunks();
  const int64_t strip = index / per_strip;
  const int fields = 32 / layout.code_bits;
  const int64_t step = layout.code_bits == 4 ? chunk * 4 + word : chunk * 2 + word / 2;
  uint32_t result = 0;
  for (int field = 0; field < fields; ++field) {
    const FieldPlace place =
        layout.code_bits == 4 ? nibble_place(lane, field) : byte_place(lane, word % 2, field);
    const int64_t feature = strip * 16 + place.feature;
    const int64_t column = feature - raw.first_feature;
    if (column < 0 || column >= raw.n) continue;  // padding, or another module's
    const int32_t row = source[step * 16 + place.row];
    const uint32_t code = row >= 0 ? read_code(raw.qweight, raw.bits, raw.n, row, column)
                                   : read_zero(raw, raw_group[step_group[step]], column);
    result |= code << (field * layout.code_bits);
  }
  // Modules of one segment meet inside a strip only where their features are apart: or-ing is
  // exact.
  codes[index] |= result;
}

__global__ void pack_groups(RawModule raw, Layout layout, const int32_t* raw_group, int scale_size,
                            unsigned char* scales, uint8_t* zeros) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= raw.n * layout.groups) return;
  const int64_t column = index % raw.n;
  const int64_t group = index / raw.n;
  const int64_t feature = raw.first_feature + column;
  const int64_t target = layout.group_element(feature / 16, group, static_cast<int>(feature % 16));
  const int64_t from = static_cast<int64_t>(raw_group[group]) * raw.n + column;
  for (int byte = 0; byte < scale_size; ++byte)
    scales[target * scale_size + byte] = raw.scales[from * scale_size + byte];
  zeros[target] = static_cast<uint8_t>(read_zero(raw, raw_group[group], column));
}

FloatType float_type(DType dtype) noexcept {
  return dtype == DType::kFloat16    ? FloatType::kF16
         : dtype == DType::kBFloat16 ? FloatType::kBF16
                                     : FloatType::kF32;
}

// Modules that share one row order and one dtype of scales, fused to one range of features.
struct SegmentPlan {
  RowOrder order;
  std::vector<std::int32_t> step_group;  // of each 16 packed rows
  std::vector<std::int32_t> raw_group;   // checkpoint's number of each group that has rows
  Layout layout;
  FloatType scale_type;
  std::vector<std::size_t> modules;
  std::int64_t first_feature = 0;
  bool has_bias = false;
  // Byte offsets in the layer's memory.
  std::int64_t codes = 0, scales = 0, zeros = 0, bias = 0, steps = 0, source = 0;
};

SegmentPlan plan_order(const GptqWeights& weights, const ValidatedModule& part) {
  SegmentPlan plan;
  plan.order = make_row_order(part.group_of_row, weights.groups, Layout::kGroupAlignment,
                              Layout::kGroupAlignment);
  for (const RowBlock& step : plan.order.blocks) {
    if (plan.raw_group.empty() || plan.raw_group.back() != step.group)
      plan.raw_group.push_back(step.group);
    plan.step_group.push_back(static_cast<std::int32_t>(plan.raw_group.size()) - 1);
  }
  const std::int64_t rows = round_up(plan.order.rows(), Layout::kRowAlignment);
  plan.order.source.resize(static_cast<std::size_t>(rows), -1);
  plan.step_group.resize(static_cast<std::size_t>(rows / Layout::kGroupAlignment),
                         plan.step_group.back());
  plan.layout = {.code_bits = weights.bits == 8 ? 8 : 4,
                 .packed_rows = rows,
                 .groups = static_cast<std::int64_t>(plan.raw_group.size())};
  plan.scale_type = float_type(part.scale_dtype);
  return plan;
}

std::vector<SegmentPlan> plan_segments(const GptqWeights& weights) {
  std::vector<SegmentPlan> segments;
  std::int64_t feature = 0;
  for (std::size_t i = 0; i < weights.modules.size(); ++i) {
    const ValidatedModule& part = weights.modules[i];
    const bool joins = i > 0 && part.group_of_row == weights.modules[i - 1].group_of_row &&
                       part.scale_dtype == weights.modules[i - 1].scale_dtype;
    if (!joins) {
      segments.push_back(plan_order(weights, part));
      segments.back().first_feature = feature;
    }
    segments.back().modules.push_back(i);
    segments.back().layout.n += part.n;
    segments.back().has_bias = segments.back().has_bias || part.bias != nullptr;
    feature += part.n;
  }
  return segments;
}

// Device copies of host arrays for the time of a pack.
class Uploads {
 public:
  explicit Uploads(cudaStream_t stream) : stream_(stream) {
    MARLINQ_CUDA_CHECK(cudaGetDevice(&device_));
  }

  const void* put(const void* data, std::size_t bytes) {
    buffers_.emplace_back(device_, DType::kInt32, static_cast<std::int64_t>((bytes + 3) / 4));
    MARLINQ_CUDA_CHECK(
        cudaMemcpyAsync(buffers_.back().data(), data, bytes, cudaMemcpyHostToDevice, stream_));
    return buffers_.back().data();
  }

 private:
  cudaStream_t stream_;
  int device_ = 0;
  std::vector<CudaBuffer> buffers_;
};

}  // namespace

DeviceWeight pack(const GptqWeights& weights, void* stream_pointer) {
  auto* stream = static_cast<cudaStream_t>(stream_pointer);
  std::vector<SegmentPlan> segments = plan_segments(weights);
  std::int64_t bytes = 0;
  const auto reserve = [&bytes](std::int64_t size) {
    constexpr std::int64_t kAlignment = 256;
    const std::int64_t at = bytes;
    bytes += round_up(size, kAlignment);
    return at;
  };
  for (SegmentPlan& s : segments) {
    const std::int64_t scale_size = s.scale_type == FloatType::kF32 ? 4 : 2;
    s.codes = reserve(s.layout.words() * 4);
    s.scales = reserve(s.layout.group_elements() * scale_size);
    s.zeros = reserve(s.layout.group_elements());
    s.bias = s.has_bias ? reserve(s.layout.n * 4) : -1;
    s.steps = reserve(static_cast<std::int64_t>(s.step_group.size()) * 4);
    s.source = reserve(s.order.identity ? 0 : s.order.rows() * 4);
  }
  int device = 0;
  MARLINQ_CUDA_CHECK(cudaGetDevice(&device));
  DeviceWeight result;
  result.memory = CudaBuffer(device, DType::kInt32, bytes / 4);
  auto* memory = static_cast<unsigned char*>(result.memory.data());
  MARLINQ_CUDA_CHECK(cudaMemsetAsync(memory, 0, static_cast<std::size_t>(bytes), stream));

  Uploads uploads(stream);
  for (const SegmentPlan& s : segments) {
    const auto* source =
        static_cast<const int32_t*>(uploads.put(s.order.source.data(), s.order.source.size() * 4));
    const auto* raw_group =
        static_cast<const int32_t*>(uploads.put(s.raw_group.data(), s.raw_group.size() * 4));
    MARLINQ_CUDA_CHECK(cudaMemcpyAsync(memory + s.steps, s.step_group.data(),
                                       s.step_group.size() * 4, cudaMemcpyHostToDevice, stream));
    if (!s.order.identity) {
      MARLINQ_CUDA_CHECK(cudaMemcpyAsync(memory + s.source, s.order.source.data(),
                                         s.order.source.size() * 4, cudaMemcpyHostToDevice,
                                         stream));
    }
    const int scale_size = s.scale_type == FloatType::kF32 ? 4 : 2;
    std::vector<float> bias(s.has_bias ? static_cast<std::size_t>(s.layout.n) : 0);
    std::int64_t feature = 0;
    for (const std::size_t i : s.modules) {
      const ValidatedModule& part = weights.modules[i];
      const auto words = static_cast<std::size_t>(packed_words(weights.k, weights.bits) * part.n);
      const auto zero_words =
          static_cast<std::size_t>(packed_words(part.n, weights.bits) * weights.groups);
      const auto scale_bytes =
          static_cast<std::size_t>(weights.groups * part.n) * static_cast<std::size_t>(scale_size);
      const RawModule raw{
          .qweight = static_cast<const uint32_t*>(uploads.put(part.qweight, words * 4)),
          .qzeros = part.qzeros == nullptr
                        ? nullptr
                        : static_cast<const uint32_t*>(uploads.put(part.qzeros, zero_words * 4)),
          .scales = static_cast<const unsigned char*>(uploads.put(part.scales, scale_bytes)),
          .bits = weights.bits,
          .add_one = part.zero_points == ZeroPoints::kV1 ? 1 : 0,
          .n = part.n,
          .first_feature = feature};
      const std::int64_t first_strip = feature / 16;
      const std::int64_t last_strip = ceil_div(feature + part.n, 16);
      const std::int64_t threads =
          (last_strip - first_strip) * s.layout.chunks() * Layout::kLanes * 4;
      const auto blocks = [](std::int64_t count) {
        return static_cast<unsigned>(ceil_div(count, kThreads));
      };
      pack_codes<<<blocks(threads), kThreads, 0, stream>>>(
          raw, s.layout, source, reinterpret_cast<const int32_t*>(memory + s.steps), raw_group,
          reinterpret_cast<uint32_t*>(memory + s.codes), first_strip, last_strip);
      MARLINQ_CUDA_CHECK(cudaGetLastError());
      pack_groups<<<blocks(part.n * s.layout.groups), kThreads, 0, stream>>>(
          raw, s.layout, raw_group, scale_size, memory + s.scales, memory + s.zeros);
      MARLINQ_CUDA_CHECK(cudaGetLastError());
      for (std::int64_t column = 0; part.bias != nullptr && column < part.n; ++column) {
        bias[static_cast<std::size_t>(feature + column)] =
            read_float(part.bias, part.bias_dtype, column);
      }
      feature += part.n;
    }
    if (s.has_bias) {
      MARLINQ_CUDA_CHECK(cudaMemcpyAsync(memory + s.bias, bias.data(), bias.size() * 4,
                                         cudaMemcpyHostToDevice, stream));
    }
    MARLINQ_CUDA_CHECK(cudaStreamSynchronize(stream));
    result.segments.push_back(
        {.view = {.codes = reinterpret_cast<const uint32_t*>(memory + s.codes),
                  .scales = memory + s.scales,
                  .zeros = memory + s.zeros,
                  .bias = s.has_bias ? reinterpret_cast<const float*>(memory + s.bias) : nullptr,
                  .step_group = reinterpret_cast<const int32_t*>(memory + s.steps),
                  .source = s.order.identity ? nullptr
                                             : reinterpret_cast<const int32_t*>(memory + s.source),
                  .scale_type = s.scale_type,
                  .code_bits = s.layout.code_bits,
                  .n = static_cast<std::int32_t>(s.layout.n),
                  .k = static_cast<std::int32_t>(weights.k),
                  .packed_rows = static_cast<std::int32_t>(s.layout.packed_rows),
                  .groups = static_cast<std::int32_t>(s.layout.groups)},
         .first_feature = s.first_feature});
    result.k_padded = std::max(result.k_padded, s.layout.packed_rows);
    result.n_padded += s.layout.strips() * Layout::kStripFeatures;
  }
  return result;
}

}  // namespace marlinq::cuda::sm80
