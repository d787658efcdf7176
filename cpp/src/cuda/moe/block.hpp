// A whole mixture-of-experts block on a GPU.
#pragma once

#include <memory>

#include "cuda/context.hpp"
#include "marlinq/cuda/cuda_backend.hpp"
#include "marlinq/moe_block.hpp"

namespace marlinq::cuda {

/// Throws invalid_argument for parts that do not fit together.
std::unique_ptr<MoeBlock<CudaBackend>> make_block(ContextState& state,
                                                  const MoeBlockParts<CudaBackend>& parts);

}  // namespace marlinq::cuda
