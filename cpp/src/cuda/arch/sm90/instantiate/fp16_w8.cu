#include "cuda/arch/sm90/instance_list.cuh"

namespace marlinq::cuda::sm90 {

extern const std::array<Instance, kInstanceCount> kInstances_fp16_w8;
const std::array<Instance, kInstanceCount> kInstances_fp16_w8 = instance_list<__half, 8>();

}  // namespace marlinq::cuda::sm90
