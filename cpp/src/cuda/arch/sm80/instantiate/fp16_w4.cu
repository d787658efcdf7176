#include "cuda/arch/sm80/instance.cuh"

namespace marlinq::cuda::sm80 {

extern const Instance kInstances_fp16_w4[];
const Instance kInstances_fp16_w4[] = {
    // token tiles, strips, warps, stages
    strip_instance<StripShape<__half, 4, 1, 1, 16, 8>>(),
    strip_instance<StripShape<__half, 4, 1, 2, 16, 4>>(),
    strip_instance<StripShape<__half, 4, 1, 3, 8, 6>>(),
    strip_instance<StripShape<__half, 4, 1, 4, 8, 6>>(),
    strip_instance<StripShape<__half, 4, 2, 1, 16, 8>>(),
    strip_instance<StripShape<__half, 4, 2, 2, 16, 4>>(),
    strip_instance<StripShape<__half, 4, 2, 3, 8, 6>>(),
    strip_instance<StripShape<__half, 4, 2, 4, 8, 4>>(),
    // tokens, strips a warp, feature warps, stages
    tile_instance<Shape<__half, 4, 32, 2, 8, 4>>(),
    tile_instance<Shape<__half, 4, 32, 2, 4, 4>>(),
    tile_instance<Shape<__half, 4, 32, 2, 2, 4>>(),
    tile_instance<Shape<__half, 4, 64, 2, 8, 4>>(),
    tile_instance<Shape<__half, 4, 64, 2, 4, 4>>(),
    tile_instance<Shape<__half, 4, 64, 2, 2, 4>>(),
};

}  // namespace marlinq::cuda::sm80
