marlinq_add_cuda_arch(NAME sm90 TARGET 90a-real SOURCES experts.cpp launch.cpp)
