if(NOT MARLINQ_CUDA)
  return()
endif()

# The runtime is linked statically, so that the library loads where there is no driver.
find_package(CUDAToolkit REQUIRED)
marlinq_add_backend(NAME cuda TYPE marlinq::CudaBackend HEADER marlinq/cuda/cuda_backend.hpp
  SOURCES completion.cpp context.cpp copy_ring.cpp cuda_backend.cpp device_buffer.cpp dispatch.cpp fetch.cu gather.cu info.cpp
    layers_to_load.cpp memory.cpp packed.cpp products.cpp raw_pieces.cpp schedule.cpp schedule_table.cpp tensor_map.cpp tune.cpp upload.cpp
    moe/align.cu moe/block.cpp moe/elementwise.cu moe/route.cu moe/routing_api.cpp)
target_link_libraries(marlinq_cuda PRIVATE CUDA::cudart_static)

# Each architecture is an object library of its own; dispatch.cpp includes the list of their tables.
file(GLOB arch_files CONFIGURE_DEPENDS "${CMAKE_CURRENT_LIST_DIR}/arch/*/arch.cmake")
foreach(arch_file IN LISTS arch_files)
  include("${arch_file}")
endforeach()
marlinq_write_cuda_arch_list()
