#include "cuda/arch/sm90/expert_instance.cuh"

namespace marlinq::cuda::sm90 {

extern const ExpertKernels kExperts_bf16_w4;
constinit const ExpertKernels kExperts_bf16_w4 = make_expert_kernels<__nv_bfloat16, 4>();

}  // namespace marlinq::cuda::sm90
