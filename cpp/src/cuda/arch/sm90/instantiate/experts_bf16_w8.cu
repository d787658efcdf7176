#include "cuda/arch/sm90/expert_instance.cuh"

namespace marlinq::cuda::sm90 {

extern const std::array<ExpertInstance, kExpertInstanceCount> kExperts_bf16_w8;
constinit const std::array<ExpertInstance, kExpertInstanceCount> kExperts_bf16_w8 =
    expert_instance_list<__nv_bfloat16, 8>();

}  // namespace marlinq::cuda::sm90
