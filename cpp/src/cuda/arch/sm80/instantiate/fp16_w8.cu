#include "cuda/arch/sm80/instance.cuh"

namespace marlinq::cuda::sm80 {

extern const Instance kInstances_fp16_w8[];
const Instance kInstances_fp16_w8[] = {
    // tokens, strips a warp, feature warps, stages
    instance<Shape<__half, 8, 8, 4, 1, 4>>(),
    instance<Shape<__half, 8, 16, 4, 1, 4>>(),
    instance<Shape<__half, 8, 32, 2, 4, 4>>(),
    instance<Shape<__half, 8, 64, 2, 8, 4>>(),
};

}  // namespace marlinq::cuda::sm80
