#include "cuda/arch/sm80/instance.cuh"

namespace marlinq::cuda::sm80 {

extern const Instance kInstances_bf16_w8[];
const Instance kInstances_bf16_w8[] = {
    // token tiles, strips, warps, stages
    strip_instance<StripShape<__nv_bfloat16, 8, 1, 1, 16, 4>>(),
    strip_instance<StripShape<__nv_bfloat16, 8, 1, 2, 16, 4>>(),
    strip_instance<StripShape<__nv_bfloat16, 8, 1, 3, 8, 3>>(),
    strip_instance<StripShape<__nv_bfloat16, 8, 1, 4, 8, 4>>(),
    strip_instance<StripShape<__nv_bfloat16, 8, 2, 1, 16, 4>>(),
    strip_instance<StripShape<__nv_bfloat16, 8, 2, 2, 16, 4>>(),
    strip_instance<StripShape<__nv_bfloat16, 8, 2, 3, 8, 3>>(),
    strip_instance<StripShape<__nv_bfloat16, 8, 2, 4, 8, 4>>(),
    // tokens, strips a warp, feature warps, stages
    tile_instance<Shape<__nv_bfloat16, 8, 32, 2, 8, 4>>(),
    tile_instance<Shape<__nv_bfloat16, 8, 32, 2, 4, 4>>(),
    tile_instance<Shape<__nv_bfloat16, 8, 32, 2, 2, 4>>(),
    tile_instance<Shape<__nv_bfloat16, 8, 64, 2, 8, 4>>(),
    tile_instance<Shape<__nv_bfloat16, 8, 64, 2, 4, 4>>(),
    tile_instance<Shape<__nv_bfloat16, 8, 64, 2, 2, 4>>(),
};

}  // namespace marlinq::cuda::sm80
