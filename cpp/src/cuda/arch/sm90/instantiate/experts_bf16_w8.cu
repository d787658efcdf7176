#include "cuda/arch/sm90/expert_instance.cuh"

namespace marlinq::cuda::sm90 {

extern const ExpertKernels kExperts_bf16_w8;
constinit const ExpertKernels kExperts_bf16_w8 = make_expert_kernels<__nv_bfloat16, 8>();

}  // namespace marlinq::cuda::sm90
