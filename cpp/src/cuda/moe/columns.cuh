// Eight neighbouring columns of a row, as the elementwise kernels read and write them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/problem.hpp"

namespace marlinq::cuda {

constexpr int kColumns = 8;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

/// Columns as they lie in memory.
template <class T>
struct Columns {
  __align__(16) T values[kColumns];
};

/// Columns `first` and on of a row of `count` columns; what lies past its end is 0. `aligned`: rows
/// begin at multiples of 16 bytes.
template <class T>
__device__ __forceinline__ Columns<T> load_columns(const T* row, int32_t first, int32_t count,
                                                   bool aligned) {
  Columns<T> columns;
  if (aligned && first + kColumns <= count) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(columns)) / 16; ++i) {
      reinterpret_cast<uint4*>(columns.values)[i] = reinterpret_cast<const uint4*>(row + first)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      columns.values[i] = first + i < count ? row[first + i] : from_float<T>(0.0F);
    }
  }
  return columns;
}

template <class T>
__device__ __forceinline__ void store_columns(const float (&values)[kColumns], T* row,
                                              int32_t first, int32_t count, bool aligned) {
  Columns<T> columns;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) columns.values[i] = from_float<T>(values[i]);
  if (aligned && first + kColumns <= count) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(columns)) / 16; ++i) {
      reinterpret_cast<uint4*>(row + first)[i] = reinterpret_cast<const uint4*>(columns.values)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (first + i < count) row[first + i] = columns.values[i];
    }
  }
}

/// f(T{}) with the type that `type` names.
template <class F>
__device__ __forceinline__ void with_type(FloatType type, F&& f) {
  switch (type) {
    case FloatType::kF32:
      return f(float{});
    case FloatType::kF16:
      return f(__half{});
    case FloatType::kBF16:
      return f(__nv_bfloat16{});
  }
}

}  // namespace marlinq::cuda
