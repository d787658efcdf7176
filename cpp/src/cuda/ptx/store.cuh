// Stores to global memory by predicate: they cost no branch.
#pragma once

#include <cstdint>

namespace marlinq::cuda::ptx {

/// 2 or 4 bytes where `on`.
template <class T>
__device__ __forceinline__ void store_if(bool on, void* place, T value) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4);
  if constexpr (sizeof(T) == 4) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p st.global.b32 [%0], %1;\n}" ::"l"(place),
        "r"(reinterpret_cast<const uint32_t&>(value)), "r"(static_cast<int>(on))
        : "memory");
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p st.global.b16 [%0], %1;\n}" ::"l"(place),
        "h"(reinterpret_cast<const uint16_t&>(value)), "r"(static_cast<int>(on))
        : "memory");
  }
}

}  // namespace marlinq::cuda::ptx
