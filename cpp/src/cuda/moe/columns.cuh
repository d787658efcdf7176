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
template <class T, int kCount = kColumns>
struct Columns {
  __align__(kCount * sizeof(T) < 16 ? 8 : 16) T values[kCount];
};

/// Columns `first` and on of a row of `count` columns; what lies past its end is 0. `aligned`: rows
/// begin at multiples of 16 bytes.
template <int kCount = kColumns, class T>
__device__ __forceinline__ Columns<T, kCount> load_columns(const T* row, int32_t first,
                                                           int32_t count, bool aligned) {
  using Word = std::conditional_t<kCount * sizeof(T) < 16, uint2, uint4>;
  Columns<T, kCount> columns;
  if (aligned && first + kCount <= count) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(columns) / sizeof(Word)); ++i) {
      reinterpret_cast<Word*>(columns.values)[i] = reinterpret_cast<const Word*>(row + first)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      columns.values[i] = first + i < count ? row[first + i] : from_float<T>(0.0F);
    }
  }
  return columns;
}

template <class T, int kCount>
__device__ __forceinline__ void store_columns(const float (&values)[kCount], T* row, int32_t first,
                                              int32_t count, bool aligned) {
  using Word = std::conditional_t<kCount * sizeof(T) < 16, uint2, uint4>;
  Columns<T, kCount> columns;
#pragma unroll
  for (int i = 0; i < kCount; ++i) columns.values[i] = from_float<T>(values[i]);
  if (aligned && first + kCount <= count) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(columns) / sizeof(Word)); ++i) {
      reinterpret_cast<Word*>(row + first)[i] = reinterpret_cast<const Word*>(columns.values)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
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
