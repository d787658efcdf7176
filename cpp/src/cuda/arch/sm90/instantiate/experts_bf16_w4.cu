#include "cuda/arch/sm90/expert_instance.cuh"

namespace marlinq::cuda::sm90 {

extern const std::array<ExpertInstance, kExpertInstanceCount> kExperts_bf16_w4;
constinit const std::array<ExpertInstance, kExpertInstanceCount> kExperts_bf16_w4 =
    expert_instance_list<__nv_bfloat16, 4>();

}  // namespace marlinq::cuda::sm90
