marlinq_add_backend(NAME cpu TYPE marlinq::CpuBackend HEADER marlinq/cpu/cpu_backend.hpp
  SOURCES buffer.cpp context.cpp cpu_backend.cpp dispatch.cpp features.cpp gemm.cpp moe.cpp pack.cpp parallel.cpp)

find_package(OpenMP COMPONENTS CXX)
if(MARLINQ_STD_THREAD)
  find_package(Threads REQUIRED)
  target_link_libraries(marlinq_cpu PRIVATE Threads::Threads)
  target_compile_definitions(marlinq_cpu PRIVATE MARLINQ_STD_THREAD)
elseif(OpenMP_CXX_FOUND)
  target_link_libraries(marlinq_cpu PRIVATE OpenMP::OpenMP_CXX)
else()
  message(WARNING "marlinq: no OpenMP found; the CPU backend runs on one thread")
endif()

# Each instruction set is an object library of its own; dispatch.cpp includes the list of their tables.
file(GLOB isa_files CONFIGURE_DEPENDS "${CMAKE_CURRENT_LIST_DIR}/isa/*/isa.cmake")
foreach(isa_file IN LISTS isa_files)
  include("${isa_file}")
endforeach()
marlinq_write_cpu_isa_list()
