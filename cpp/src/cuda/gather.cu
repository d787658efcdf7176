#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/cuda_check.hpp"
#include "cuda/gather.hpp"
#include "cuda/ptx/launch.cuh"

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
  // The product may start now, and ask for its weights.
  ptx::launch_dependents();
  const int64_t row = blockIdx.y;
  const int32_t first = (blockIdx.x * kThreads + threadIdx.x) * kColumns;
  int32_t from[kColumns];
  if (first < columns) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      from[i] = source != nullptr ? source[first + i] : (first + i < k ? first + i : -1);
    }
  }
  // All of the kernel before: this one writes what a product before may still read.
  ptx::wait_for_predecessor();
  if (first >= columns) return;
  __align__(16) Out values[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    values[i] = from[i] < 0 ? Out(0.0f) : convert<In, Out>(x[row * x_stride + from[i]]);
  }
  *reinterpret_cast<uint4*>(out + row * columns + first) = *reinterpret_cast<const uint4*>(values);
}

template <class In, class Out>
void launch(const dim3& grid, bool dependent, cudaStream_t stream, const void* x, int64_t x_stride,
            int32_t k, const int32_t* source, void* out, int32_t columns) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  MARLINQ_CUDA_CHECK(cudaLaunchKernelEx(&config, gather<In, Out>, static_cast<const In*>(x),
                                        x_stride, k, source, static_cast<Out*>(out), columns));
}

}  // namespace

void gather_rows(const void* x, FloatType x_type, std::int64_t x_stride, std::int32_t m,
                 std::int32_t k, const std::int32_t* source, void* out, FloatType out_type,
                 std::int32_t columns, bool dependent_launch, void* stream) {
  constexpr std::int32_t kMaxRows = 65535;  // of a grid's second dimension
  const auto size = x_type == FloatType::kF32 ? 4 : 2;
  for (std::int32_t first = 0; first < m; first += kMaxRows) {
    const dim3 grid((columns / kColumns + kThreads - 1) / kThreads, std::min(kMaxRows, m - first));
    const void* rows = static_cast<const unsigned char*>(x) + first * x_stride * size;
    void* target =
        static_cast<unsigned char*>(out) + static_cast<std::int64_t>(first) * columns * 2;
    auto* s = static_cast<cudaStream_t>(stream);
    if (x_type == FloatType::kF32) {
      launch<float, __half>(grid, dependent_launch, s, rows, x_stride, k, source, target, columns);
    } else if (out_type == FloatType::kBF16) {
      launch<__nv_bfloat16, __nv_bfloat16>(grid, dependent_launch, s, rows, x_stride, k, source,
                                           target, columns);
    } else {
      launch<__half, __half>(grid, dependent_launch, s, rows, x_stride, k, source, target, columns);
    }
  }
}

}  // namespace marlinq::cuda
