marlinq_add_cuda_arch(NAME sm80 SOURCES experts.cpp launch.cpp load.cpp pack.cu pack_plan.cpp)
