#include "cuda/arch/sm90/expert_instance.cuh"

namespace marlinq::cuda::sm90 {

extern const ExpertKernels kExperts_fp16_w4;
constinit const ExpertKernels kExperts_fp16_w4 = make_expert_kernels<__half, 4>();

}  // namespace marlinq::cuda::sm90
