// Packing for the sm_80 kernels on the device.
#pragma once

#include "cuda/arch/sm80/pack_piece.hpp"

namespace marlinq::cuda::sm80 {

/// Packs a piece into its segment. Pieces that share a block of features are packed in any order,
/// but one after another. Asynchronous. Throws device.
void pack_piece(const PieceToPack& piece, void* stream);

}  // namespace marlinq::cuda::sm80
