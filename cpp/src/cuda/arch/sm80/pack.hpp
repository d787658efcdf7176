// Packing for the sm_80 kernels on the device.
#pragma once

#include <span>

#include "cuda/arch/sm80/pack_piece.hpp"

namespace marlinq::cuda::sm80 {

/// Packs pieces of one width of codes into their segments, in few launches. Pieces that share a block of
/// features are packed one after another. Asynchronous. Throws device.
void pack_pieces(std::span<const PieceToPack> pieces, void* stream);

/// Makes bfloat16 scales, all of which has_as_half(), float16 in place: once, after all pieces. Asynchronous. Throws device.
void convert_scales(const ScalesToConvert& scales, void* stream);

}  // namespace marlinq::cuda::sm80
