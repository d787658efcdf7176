marlinq_add_cuda_arch(NAME sm80 SOURCES launch.cpp pack.cu)
