// Launching a kernel, perhaps as a programmatic dependent of the one before.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/cuda_check.hpp"

namespace marlinq::cuda {

/// `dependent`: the kernel may start before the one before it on the stream has ended, and waits for
/// it by itself.
template <class... Parameters>
void launch_kernel(void (*kernel)(Parameters...), const dim3& grid, int threads,
                   std::int64_t shared_bytes, bool dependent, cudaStream_t stream,
                   const std::type_identity_t<Parameters>&... parameters) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  MARLINQ_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, parameters...));
}

}  // namespace marlinq::cuda
