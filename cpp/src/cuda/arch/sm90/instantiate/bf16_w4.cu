#include "cuda/arch/sm90/instance_list.cuh"

namespace marlinq::cuda::sm90 {

extern const std::array<Instance, kInstanceCount> kInstances_bf16_w4;
const std::array<Instance, kInstanceCount> kInstances_bf16_w4 = instance_list<__nv_bfloat16, 4>();

}  // namespace marlinq::cuda::sm90
