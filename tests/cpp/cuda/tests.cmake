# Tests that need the CUDA toolkit: loading on a fake device, which runs everywhere, and on a real one.

# The library's own loading, over a runtime of the tests'. Its objects come from source: nothing may bring the real
# runtime in.
set(sources completion.cpp copy_ring.cpp device_buffer.cpp layers_to_load.cpp raw_pieces.cpp upload.cpp arch/sm80/load.cpp
  arch/sm80/pack_plan.cpp)
list(TRANSFORM sources PREPEND "${PROJECT_SOURCE_DIR}/cpp/src/cuda/")
marlinq_test_program(cuda_load cuda ${sources} $<TARGET_OBJECTS:marlinq_core>
  cpp/cuda/device_memory.cpp
  cpp/cuda/fake_device.cpp
  cpp/cuda/packed_layer.cpp
  cpp/cuda/test_fake_device.cpp
  cpp/cuda/test_load.cpp
  cpp/support/compare.cpp
  cpp/support/generators.cpp
  cpp/support/numbers.cpp
  cpp/support/reference.cpp)
find_package(CUDAToolkit REQUIRED)
find_package(Threads REQUIRED)
target_include_directories(test_cuda_load PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/cpp" "${CMAKE_CURRENT_BINARY_DIR}/generated"
  ${CUDAToolkit_INCLUDE_DIRS})
target_compile_options(test_cuda_load PRIVATE -Wno-missing-field-initializers $<$<CXX_COMPILER_ID:GNU>:-Wno-restrict>)
target_link_libraries(test_cuda_load PRIVATE marlinq_internal Threads::Threads)

marlinq_test_program(cuda_plans cuda cpp/cuda/test_schedules.cpp
  $<$<TARGET_EXISTS:marlinq_cuda_sm90>:cpp/cuda/test_sm90_plans.cpp>)
target_include_directories(test_cuda_plans PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
target_link_libraries(test_cuda_plans PRIVATE marlinq_test_support marlinq_internal CUDA::cudart_static)

# On a device; a visible skip where there is none. What the runtime allocates is counted.
marlinq_add_test(gpu
  cpp/cuda/counted_memory.cpp
  cpp/cuda/device_memory.cpp
  cpp/cuda/packed_layer.cpp
  cpp/cuda/test_backend_load.cpp
  cpp/cuda/test_fetch.cpp
  cpp/cuda/test_load.cpp
  cpp/cuda/test_moe_kernels.cpp
  $<$<TARGET_EXISTS:marlinq_cuda_sm90>:cpp/cuda/test_sm90_tiles.cpp>)
target_include_directories(test_gpu PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
target_link_libraries(test_gpu PRIVATE CUDA::cudart_static)
foreach(function cudaMalloc cudaFree cudaHostAlloc cudaFreeHost)
  target_link_options(test_gpu PRIVATE "LINKER:--wrap=${function}")
endforeach()
set_tests_properties(gpu PROPERTIES SKIP_REGULAR_EXPRESSION "no CUDA device")
