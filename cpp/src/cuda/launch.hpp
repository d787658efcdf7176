// Launching a kernel, perhaps as a programmatic dependent of the one before.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/cuda_check.hpp"

namespace marlinq::cuda {

/// `dependent`: the kernel may start before the one before it on the stream has ended, and waits for
/// it by itself. Blocks next to each other make clusters of `cluster_blocks`.
template <class... Parameters>
void launch_clusters(void (*kernel)(Parameters...), const dim3& grid, int cluster_blocks,
                     int threads, std::int64_t shared_bytes, bool dependent, cudaStream_t stream,
                     const std::type_identity_t<Parameters>&... parameters) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster_blocks > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(cluster_blocks), 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  MARLINQ_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, parameters...));
}

/// The same without clusters.
template <class... Parameters>
void launch_kernel(void (*kernel)(Parameters...), const dim3& grid, int threads,
                   std::int64_t shared_bytes, bool dependent, cudaStream_t stream,
                   const std::type_identity_t<Parameters>&... parameters) {
  launch_clusters(kernel, grid, 1, threads, shared_bytes, dependent, stream, parameters...);
}

}  // namespace marlinq::cuda
