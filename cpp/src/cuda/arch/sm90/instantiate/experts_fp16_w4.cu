#include "cuda/arch/sm90/expert_instance.cuh"

namespace marlinq::cuda::sm90 {

extern const std::array<ExpertInstance, kExpertInstanceCount> kExperts_fp16_w4;
constinit const std::array<ExpertInstance, kExpertInstanceCount> kExperts_fp16_w4 =
    expert_instance_list<__half, 4>();

}  // namespace marlinq::cuda::sm90
