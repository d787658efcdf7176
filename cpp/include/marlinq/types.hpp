// Element types, devices and non-owning views of arrays.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "marlinq/export.hpp"

namespace marlinq {

enum class DType : std::uint8_t { kFloat32, kFloat16, kBFloat16, kInt32, kInt64 };

/// Bytes of one element.
constexpr std::size_t size_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kInt64:
      return 8;
  }
  return 0;
}

/// "float32", "float16", "bfloat16", "int32", "int64".
MARLINQ_API std::string_view to_string(DType dtype) noexcept;

enum class DeviceKind : std::uint8_t { kCpu, kCuda };

struct Device {
  DeviceKind kind = DeviceKind::kCpu;
  int index = 0;

  friend bool operator==(const Device&, const Device&) = default;
};

/// "cpu", "cuda:1".
MARLINQ_API std::string to_string(Device device);

/// Reads "cpu", "cuda" (index 0) or "cuda:N". Throws invalid_argument.
MARLINQ_API Device parse_device(std::string_view text);

/// A row-major matrix that somebody else owns: element (i, j) is at index i * row_stride + j. The
/// address is a multiple of the element's size.
template <class Pointer>
struct BasicMatrixView {
  Pointer data = nullptr;
  DType dtype = DType::kFloat32;
  Device device = {};
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t row_stride = 0;  // elements
};

using ConstMatrixView = BasicMatrixView<const void*>;
using MatrixView = BasicMatrixView<void*>;

/// The same memory, read only.
constexpr ConstMatrixView as_const(const MatrixView& view) noexcept {
  return {view.data, view.dtype, view.device, view.rows, view.cols, view.row_stride};
}

/// A contiguous one-dimensional array that somebody else owns.
template <class Pointer>
struct BasicArrayView {
  Pointer data = nullptr;
  DType dtype = DType::kInt32;
  Device device = {};
  std::int64_t size = 0;
};

using ConstArrayView = BasicArrayView<const void*>;
using ArrayView = BasicArrayView<void*>;

/// The same memory, read only.
constexpr ConstArrayView as_const(const ArrayView& view) noexcept {
  return {view.data, view.dtype, view.device, view.size};
}

}  // namespace marlinq
