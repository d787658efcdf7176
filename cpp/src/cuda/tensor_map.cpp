#include "cuda/tensor_map.hpp"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>

#include "core/concat.hpp"
#include "core/integers.hpp"
#include "cuda/cuda_check.hpp"
#include "marlinq/error.hpp"

namespace marlinq::cuda {
namespace {

// The driver is not linked: the library loads where there is none.
decltype(&cuTensorMapEncodeTiled) find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  MARLINQ_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                      cudaEnableDefault, &found));
#else
  MARLINQ_CUDA_CHECK(
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
  if (function == nullptr) throw Error(ErrorCode::kDevice, "the driver makes no tensor maps");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

}  // namespace

TensorMap tensor_map(const void* data, FloatType type, std::int64_t columns, std::int64_t rows,
                     std::int64_t row_stride, std::int32_t box_rows) {
  static const auto encode = find_encoder();
  constexpr std::int64_t kRowMultiple = 8;  // 16 bytes; one row may have any stride
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {
      static_cast<cuuint64_t>(round_up(rows == 1 ? columns : row_stride, kRowMultiple) * 2)};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  alignas(64) CUtensorMap map;
  const CUresult result = encode(
      &map,
      type == FloatType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw Error(ErrorCode::kDevice,
                concat("cuTensorMapEncodeTiled failed with code ", static_cast<int>(result),
                       " for ", rows, " x ", columns));
  }
  TensorMap bytes;
  static_assert(sizeof bytes == sizeof map);
  std::memcpy(&bytes, &map, sizeof map);
  return bytes;
}

}  // namespace marlinq::cuda
