#include "cuda/arch/sm80/pack.hpp"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/cuda_check.hpp"

namespace marlinq::cuda::sm80 {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ uint32_t read_code(const RawModule& raw, int64_t row, int64_t column) {
  const int64_t bit = row * raw.bits;
  const int shift = static_cast<int>(bit % 32);
  const uint32_t* word = raw.qweight + bit / 32 * raw.n + column;
  uint32_t value = word[0] >> shift;
  if (shift + raw.bits > 32) value |= word[raw.n] << (32 - shift);
  return value & ((1u << raw.bits) - 1u);
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

__device__ __forceinline__ float read_scale(const RawModule& raw, FloatType type, int64_t group,
                                            int64_t column) {
  const int64_t at = group * raw.n + column;
  switch (type) {
    case FloatType::kF32:
      return static_cast<const float*>(raw.scales)[at];
    case FloatType::kF16:
      return __half2float(static_cast<const __half*>(raw.scales)[at]);
    default:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(raw.scales)[at]);
  }
}

// One thread a word of the strips that the module touches.
__global__ void pack_codes(RawModule raw, Layout layout, FloatType scale_type, PackTables tables,
                           uint32_t* codes, int64_t first_strip, int64_t end_strip) {
  const int64_t per_strip = layout.chunks * layout.pieces() * Layout::kLanes * Layout::kLaneWords;
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= (end_strip - first_strip) * per_strip) return;
  const int word = index % Layout::kLaneWords;
  const int lane = index / Layout::kLaneWords % Layout::kLanes;
  const int piece = index / (Layout::kLaneWords * Layout::kLanes) % layout.pieces();
  const int64_t chunk =
      index / (Layout::kLaneWords * Layout::kLanes * layout.pieces()) % layout.chunks;
  const int64_t strip = first_strip + index / per_strip;
  const bool nibbles = layout.code_bits == 4;
  const int64_t step =
      chunk * Layout::kChunkSteps + (nibbles ? word : piece * 2 + word / 2);
  const int64_t group = tables.raw_group[tables.step_group[step]];
  uint32_t result = 0;
  for (int field = 0; field < 32 / layout.code_bits; ++field) {
    const FieldPlace place = nibbles ? nibble_place(lane, field) : byte_place(lane, word % 2, field);
    const int64_t column = strip * Layout::kStripFeatures + place.feature - raw.first_feature;
    if (column < 0 || column >= raw.n) continue;  // padding, or another module's
    const int32_t row = tables.source[step * Layout::kGroupAlignment + place.row];
    const bool counts = row >= 0 && read_scale(raw, scale_type, group, column) != 0.0f;
    const uint32_t code = counts ? read_code(raw, row, column) : read_zero(raw, group, column);
    result |= code << (field * layout.code_bits);
  }
  // Modules of one segment that meet inside a strip have features of their own: or-ing is exact.
  codes[layout.word(strip, chunk, piece, lane, word)] |= result;
}

__global__ void pack_groups(RawModule raw, Layout layout, FloatType scale_type,
                            const int32_t* raw_groups, unsigned char* groups,
                            int32_t* scales_spread) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= raw.n * layout.groups) return;
  const int64_t column = index % raw.n;
  const int64_t group = index / raw.n;
  const int64_t raw_group = raw_groups[group];
  const int64_t feature = raw.first_feature + column;
  const int in_strip = static_cast<int>(feature % Layout::kStripFeatures);
  unsigned char* record = groups + layout.record(feature / Layout::kStripFeatures, group);
  unsigned char* target = record + layout.scale_place(in_strip);
  const int64_t from = raw_group * raw.n + column;
  const float scale = read_scale(raw, scale_type, raw_group, column);
  switch (scale_type) {
    case FloatType::kF32:
      *reinterpret_cast<float*>(target) = scale == 0.0f ? 1.0f : scale;
      break;
    case FloatType::kF16:
      *reinterpret_cast<uint16_t*>(target) =
          scale == 0.0f ? 0x3c00 : static_cast<const uint16_t*>(raw.scales)[from];
      break;
    case FloatType::kBF16:
      *reinterpret_cast<uint16_t*>(target) =
          scale == 0.0f ? 0x3f80 : static_cast<const uint16_t*>(raw.scales)[from];
      break;
  }
  if (layout.has_zeros) {
    record[layout.zero_place(in_strip)] = static_cast<uint8_t>(read_zero(raw, raw_group, column));
  }
  // Between these bounds a quotient stays below 2^60, and a sum in units of any scale far from
  // overflow. float16 scales are always between 2^-24 and 2^16.
  constexpr float kLeast = 0x1p-30f;
  constexpr float kMost = 0x1p30f;
  const float size = fabsf(scale);
  if (scale_type != FloatType::kF16 && scale != 0.0f && !(size >= kLeast && size <= kMost)) {
    *scales_spread = 1;
  }
}

}  // namespace

void pack_module(const RawModule& raw, const SegmentPlan& plan, const PackTables& tables,
                 std::uint32_t* codes, unsigned char* groups, std::int32_t* scales_spread,
                 void* stream_pointer) {
  auto* stream = static_cast<cudaStream_t>(stream_pointer);
  const Layout& layout = plan.layout;
  const auto blocks = [](std::int64_t count) {
    return static_cast<unsigned>(ceil_div(count, kThreads));
  };
  const std::int64_t first_strip = raw.first_feature / Layout::kStripFeatures;
  const std::int64_t end_strip = ceil_div(raw.first_feature + raw.n, Layout::kStripFeatures);
  const std::int64_t words = (end_strip - first_strip) * layout.chunks * layout.pieces() *
                             Layout::kLanes * Layout::kLaneWords;
  pack_codes<<<blocks(words), kThreads, 0, stream>>>(raw, layout, plan.scale_type, tables, codes,
                                                     first_strip, end_strip);
  MARLINQ_CUDA_CHECK(cudaGetLastError());
  pack_groups<<<blocks(raw.n * layout.groups), kThreads, 0, stream>>>(
      raw, layout, plan.scale_type, tables.raw_group, groups, scales_spread);
  MARLINQ_CUDA_CHECK(cudaGetLastError());
}

}  // namespace marlinq::cuda::sm80
