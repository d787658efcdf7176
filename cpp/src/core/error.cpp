// Error, and the names of the enumerations that messages and users see.
#include "marlinq/error.hpp"

#include <array>
#include <charconv>
#include <string>
#include <utility>

#include "core/concat.hpp"
#include "marlinq/load_options.hpp"
#include "marlinq/moe_block.hpp"
#include "marlinq/routing.hpp"
#include "marlinq/types.hpp"

namespace marlinq {
namespace {

template <class Enum, std::size_t kCount>
using Names = std::array<std::pair<Enum, std::string_view>, kCount>;

constexpr Names<ErrorCode, 6> kErrorCodes = {{
    {ErrorCode::kInvalidArgument, "invalid_argument"},
    {ErrorCode::kInvalidFile, "invalid_file"},
    {ErrorCode::kUnsupported, "unsupported"},
    {ErrorCode::kOutOfMemory, "out_of_memory"},
    {ErrorCode::kDevice, "device"},
    {ErrorCode::kInternal, "internal"},
}};

constexpr Names<DType, 5> kDTypes = {{
    {DType::kFloat32, "float32"},
    {DType::kFloat16, "float16"},
    {DType::kBFloat16, "bfloat16"},
    {DType::kInt32, "int32"},
    {DType::kInt64, "int64"},
}};

constexpr Names<Compute, 5> kComputes = {{
    {Compute::kAuto, "auto"},
    {Compute::kFloat32, "float32"},
    {Compute::kInt16, "int16"},
    {Compute::kBFloat16, "bfloat16"},
    {Compute::kInt8, "int8"},
}};

constexpr Names<Activation, 4> kActivations = {{
    {Activation::kSilu, "silu"},
    {Activation::kGelu, "gelu"},
    {Activation::kGeluTanh, "gelu_tanh"},
    {Activation::kClampedSwiglu, "clamped_swiglu"},
}};

constexpr Names<Scoring, 2> kScorings = {{
    {Scoring::kSoftmax, "softmax"},
    {Scoring::kSigmoid, "sigmoid"},
}};

template <class Enum, std::size_t kCount>
std::string_view name_of(const Names<Enum, kCount>& names, Enum value) noexcept {
  for (const auto& [candidate, name] : names) {
    if (candidate == value) return name;
  }
  return "unknown";
}

template <class Enum, std::size_t kCount>
Enum value_of(const Names<Enum, kCount>& names, std::string_view what, std::string_view text) {
  std::string known;
  for (const auto& [value, name] : names) {
    if (name == text) return value;
    known += (known.empty() ? "" : ", ") + std::string(name);
  }
  throw Error(ErrorCode::kInvalidArgument, concat(what, ": '", text, "', expected one of ", known));
}

}  // namespace

Error::Error(ErrorCode code, const std::string& message, std::source_location where)
    : std::runtime_error(message), code_(code), where_(where) {}

std::string_view to_string(ErrorCode code) noexcept { return name_of(kErrorCodes, code); }
std::string_view to_string(DType dtype) noexcept { return name_of(kDTypes, dtype); }
std::string_view to_string(Compute compute) noexcept { return name_of(kComputes, compute); }
std::string_view to_string(Activation activation) noexcept {
  return name_of(kActivations, activation);
}

Compute parse_compute(std::string_view text) { return value_of(kComputes, "compute", text); }
Activation parse_activation(std::string_view text) {
  return value_of(kActivations, "activation", text);
}
Scoring parse_scoring(std::string_view text) { return value_of(kScorings, "scoring", text); }

std::string to_string(Device device) {
  return device.kind == DeviceKind::kCpu ? std::string("cpu") : concat("cuda:", device.index);
}

Device parse_device(std::string_view text) {
  if (text == "cpu") return {DeviceKind::kCpu, 0};
  if (text == "cuda") return {DeviceKind::kCuda, 0};
  constexpr std::string_view kCudaPrefix = "cuda:";
  if (text.starts_with(kCudaPrefix)) {
    const std::string_view digits = text.substr(kCudaPrefix.size());
    int index = -1;
    const auto [end, status] = std::from_chars(digits.data(), digits.data() + digits.size(), index);
    if (status == std::errc() && end == digits.data() + digits.size() && index >= 0) {
      return {DeviceKind::kCuda, index};
    }
  }
  throw Error(ErrorCode::kInvalidArgument,
              concat("device: '", text, "', expected 'cpu', 'cuda' or 'cuda:N'"));
}

}  // namespace marlinq
