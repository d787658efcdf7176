// Codes of the wgmma kernels: from shared memory into the registers of a lane.
#pragma once

#include <cstdint>

#include "cuda/ptx/copy.cuh"

namespace marlinq::cuda::sm90 {

/// What a lane has of `kSteps` steps of 16 rows, kBits / 4 words of each, the first of which is step `first` of a chunk;
/// `chunk`: the address of this lane's first codes of it. A load brings four steps of 4 bits, or two of 8.
template <int kBits, int kSteps>
__device__ __forceinline__ void load_step_codes(uint32_t chunk, int first, uint32_t* words) {
  constexpr int kStepWords = kBits / 4;
  constexpr int kLoadSteps = 4 / kStepWords;
  if constexpr (kSteps < kLoadSteps) {
    static_assert(kSteps * kStepWords == 2);
    const uint2 q = ptx::load_shared_8(chunk + first * kStepWords * 4);
    words[0] = q.x;
    words[1] = q.y;
  } else {
#pragma unroll
    for (int step = 0; step < kSteps; step += kLoadSteps) {
      const uint4 q = ptx::load_shared_16(chunk + (first + step) / kLoadSteps * 512);
      words[step * kStepWords] = q.x;
      words[step * kStepWords + 1] = q.y;
      words[step * kStepWords + 2] = q.z;
      words[step * kStepWords + 3] = q.w;
    }
  }
}

}  // namespace marlinq::cuda::sm90
