// Matrices as the kernels of a MoE block see them; no CUDA header.
#pragma once

#include <cstdint>

#include "cuda/problem.hpp"
#include "marlinq/types.hpp"

namespace marlinq::cuda {

/// Device memory that is read, of float32, float16 or bfloat16; null: absent.
struct FloatMatrix {
  const void* data = nullptr;
  FloatType type = FloatType::kF32;
  std::int64_t row_stride = 0;  // elements
};

/// The same, written.
struct FloatOutput {
  void* data = nullptr;
  FloatType type = FloatType::kF32;
  std::int64_t row_stride = 0;  // elements
};

inline FloatType float_type_of(DType dtype) noexcept {
  return dtype == DType::kFloat16    ? FloatType::kF16
         : dtype == DType::kBFloat16 ? FloatType::kBF16
                                     : FloatType::kF32;
}

inline FloatMatrix float_matrix(const ConstMatrixView& view) noexcept {
  return {.data = view.data, .type = float_type_of(view.dtype), .row_stride = view.row_stride};
}

inline FloatOutput float_output(const MatrixView& view) noexcept {
  return {.data = view.data, .type = float_type_of(view.dtype), .row_stride = view.row_stride};
}

inline TopkIds topk_ids_of(const ConstMatrixView& view) noexcept {
  return {.data = view.data,
          .wide = view.dtype == DType::kInt64,
          .row_stride = view.row_stride,
          .tokens = static_cast<std::int32_t>(view.rows),
          .top_k = static_cast<std::int32_t>(view.cols)};
}

}  // namespace marlinq::cuda
