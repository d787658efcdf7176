#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/cuda_check.hpp"
#include "cuda/gather.hpp"

namespace marlinq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 8;  // of a thread: one 16-byte store

template <class In, class Out>
__device__ __forceinline__ Out convert(In value) {
  if constexpr (sizeof(In) == sizeof(Out)) {
    return value;
  } else {
    return __float2half_rn(value);
  }
}

template <class In, class Out>
__global__ void gather(const In* x, int64_t x_stride, int32_t k, const int32_t* source, Out* out,
                       int32_t columns) {
  const int64_t row = blockIdx.y;
  const int32_t first = (blockIdx.x * kThreads + threadIdx.x) * kColumns;
  if (first >= columns) return;
  __align__(16) Out values[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int32_t from = source != nullptr ? source[first + i] : (first + i < k ? first + i : -1);
    values[i] = from < 0 ? Out(0.0f) : convert<In, Out>(x[row * x_stride + from]);
  }
  *reinterpret_cast<uint4*>(out + row * columns + first) = *reinterpret_cast<const uint4*>(values);
}

}  // namespace

void gather_rows(const void* x, FloatType x_type, std::int64_t x_stride, std::int32_t m,
                 std::int32_t k, const std::int32_t* source, void* out, FloatType out_type,
                 std::int32_t columns, void* stream) {
  constexpr std::int32_t kMaxRows = 65535;  // of a grid's second dimension
  const auto size = x_type == FloatType::kF32 ? 4 : 2;
  for (std::int32_t first = 0; first < m; first += kMaxRows) {
    const dim3 grid((columns / kColumns + kThreads - 1) / kThreads, std::min(kMaxRows, m - first));
    const auto* rows = static_cast<const unsigned char*>(x) + first * x_stride * size;
    auto* target =
        static_cast<unsigned char*>(out) + static_cast<std::int64_t>(first) * columns * 2;
    auto* s = static_cast<cudaStream_t>(stream);
    if (x_type == FloatType::kF32) {
      gather<<<grid, kThreads, 0, s>>>(reinterpret_cast<const float*>(rows), x_stride, k, source,
                                       reinterpret_cast<__half*>(target), columns);
    } else if (out_type == FloatType::kBF16) {
      gather<<<grid, kThreads, 0, s>>>(reinterpret_cast<const __nv_bfloat16*>(rows), x_stride, k,
                                       source, reinterpret_cast<__nv_bfloat16*>(target), columns);
    } else {
      gather<<<grid, kThreads, 0, s>>>(reinterpret_cast<const __half*>(rows), x_stride, k, source,
                                       reinterpret_cast<__half*>(target), columns);
    }
    MARLINQ_CUDA_CHECK(cudaGetLastError());
  }
}

}  // namespace marlinq::cuda
