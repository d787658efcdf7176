# How a backend and an instruction set declare themselves to the build. Each lives in a folder of
# its own; nothing else names it.

set_property(GLOBAL PROPERTY MARLINQ_BACKENDS "")
set_property(GLOBAL PROPERTY MARLINQ_CPU_ISAS "")
set_property(GLOBAL PROPERTY MARLINQ_CUDA_ARCHS "")

# marlinq_add_backend(NAME name TYPE c++-type HEADER public-header SOURCES file...)
# Adds the object library marlinq_<name> from sources beside the calling backend.cmake.
function(marlinq_add_backend)
  cmake_parse_arguments(arg "" "NAME;TYPE;HEADER" "SOURCES" ${ARGN})
  list(TRANSFORM arg_SOURCES PREPEND "${CMAKE_CURRENT_LIST_DIR}/")
  add_library(marlinq_${arg_NAME} OBJECT ${arg_SOURCES})
  marlinq_target_options(marlinq_${arg_NAME})
  target_link_libraries(marlinq_${arg_NAME} PUBLIC marlinq_headers PRIVATE marlinq_internal)
  set_property(GLOBAL APPEND PROPERTY MARLINQ_BACKENDS ${arg_NAME})
  set_property(GLOBAL PROPERTY MARLINQ_BACKEND_${arg_NAME}_TYPE ${arg_TYPE})
  set_property(GLOBAL PROPERTY MARLINQ_BACKEND_${arg_NAME}_HEADER ${arg_HEADER})
endfunction()

# Writes marlinq_backend_list.hpp for runtime/registry.cpp: the backends, and what the build says of itself.
function(marlinq_write_backend_list directory)
  get_property(names GLOBAL PROPERTY MARLINQ_BACKENDS)
  set(includes "")
  set(entries "")
  foreach(name IN LISTS names)
    get_property(header GLOBAL PROPERTY MARLINQ_BACKEND_${name}_HEADER)
    get_property(type GLOBAL PROPERTY MARLINQ_BACKEND_${name}_TYPE)
    string(APPEND includes "#include \"${header}\"\n")
    list(APPEND entries "erase_backend<${type}>()")
  endforeach()
  list(JOIN entries ", " entries)
  get_property(note GLOBAL PROPERTY MARLINQ_CUDA_NOTE)
  file(CONFIGURE OUTPUT "${directory}/marlinq_backend_list.hpp"
    CONTENT "#pragma once\n\n${includes}\n#define MARLINQ_BACKEND_LIST ${entries}\n#define MARLINQ_BUILD_NOTE \"${note}\"\n")
endfunction()

# marlinq_add_cpu_isa(NAME name [PROCESSORS regex] [FLAGS flag...])
# Compiles isa/<name>/kernels.cpp on its own with FLAGS, where CMAKE_SYSTEM_PROCESSOR matches.
function(marlinq_add_cpu_isa)
  cmake_parse_arguments(arg "" "NAME;PROCESSORS" "FLAGS" ${ARGN})
  if(arg_PROCESSORS AND NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(${arg_PROCESSORS})$")
    return()
  endif()
  add_library(marlinq_cpu_${arg_NAME} OBJECT "${CMAKE_CURRENT_LIST_DIR}/kernels.cpp")
  marlinq_target_options(marlinq_cpu_${arg_NAME})
  # Kernels are useless unoptimised, in every build type. Sanitizers keep their instrumentation of the memory that
  # kernels are given; of the kernels' own variables, hundreds in an unrolled tile, it takes GCC minutes.
  target_compile_options(marlinq_cpu_${arg_NAME} PRIVATE -O3 -fno-exceptions ${arg_FLAGS})
  if(MARLINQ_SANITIZE MATCHES "address" AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    target_compile_options(marlinq_cpu_${arg_NAME} PRIVATE --param=asan-stack=0 -fno-sanitize-address-use-after-scope)
  endif()
  if(MARLINQ_SANITIZE MATCHES "undefined")
    target_compile_options(marlinq_cpu_${arg_NAME} PRIVATE -fno-sanitize=null,alignment,object-size,pointer-overflow)
  endif()
  # The intrinsics headers of GCC 12 and 13 read variables that they leave undefined on purpose.
  target_compile_options(marlinq_cpu_${arg_NAME} PRIVATE
    $<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized -Wno-maybe-uninitialized>)
  target_link_libraries(marlinq_cpu_${arg_NAME} PRIVATE marlinq_internal)
  set_property(GLOBAL APPEND PROPERTY MARLINQ_CPU_ISAS ${arg_NAME})
endfunction()

# Writes marlinq_cpu_isa_list.hpp for cpu/dispatch.cpp.
function(marlinq_write_cpu_isa_list)
  get_property(names GLOBAL PROPERTY MARLINQ_CPU_ISAS)
  set(declarations "")
  set(entries "")
  foreach(name IN LISTS names)
    string(APPEND declarations
      "namespace marlinq::cpu::${name} {\nextern const IsaKernels kKernels;\n}\n")
    list(APPEND entries "&${name}::kKernels")
  endforeach()
  list(JOIN entries ", " entries)
  file(CONFIGURE OUTPUT "${CMAKE_CURRENT_BINARY_DIR}/generated/marlinq_cpu_isa_list.hpp"
    CONTENT "#pragma once\n\n${declarations}\n#define MARLINQ_CPU_ISA_LIST ${entries}\n")
  target_include_directories(marlinq_cpu PRIVATE "${CMAKE_CURRENT_BINARY_DIR}/generated")
endfunction()

# marlinq_add_cuda_arch(NAME name [TARGET architecture] [SOURCES file...])
# Compiles arch/<name>/ on its own: the given sources and instantiate/*.cu. TARGET, such as 90a-real: for that alone,
# and only where CMAKE_CUDA_ARCHITECTURES has 90.
function(marlinq_add_cuda_arch)
  cmake_parse_arguments(arg "" "NAME;TARGET" "SOURCES" ${ARGN})
  if(arg_TARGET)
    string(REGEX MATCH "^[0-9]+" number "${arg_TARGET}")
    if(NOT CMAKE_CUDA_ARCHITECTURES MATCHES "(^|;)(${number}|all|native)")
      return()
    endif()
  endif()
  list(TRANSFORM arg_SOURCES PREPEND "${CMAKE_CURRENT_LIST_DIR}/")
  file(GLOB instances CONFIGURE_DEPENDS "${CMAKE_CURRENT_LIST_DIR}/instantiate/*.cu")
  add_library(marlinq_cuda_${arg_NAME} OBJECT ${arg_SOURCES} ${instances})
  if(arg_TARGET)
    set_target_properties(marlinq_cuda_${arg_NAME} PROPERTIES CUDA_ARCHITECTURES ${arg_TARGET})
  endif()
  marlinq_target_options(marlinq_cuda_${arg_NAME})
  target_compile_options(marlinq_cuda_${arg_NAME} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr>)
  target_link_libraries(marlinq_cuda_${arg_NAME} PRIVATE marlinq_internal CUDA::cudart_static)
  set_property(GLOBAL APPEND PROPERTY MARLINQ_CUDA_ARCHS ${arg_NAME})
endfunction()

# Writes marlinq_cuda_arch_list.hpp for cuda/dispatch.cpp.
function(marlinq_write_cuda_arch_list)
  get_property(names GLOBAL PROPERTY MARLINQ_CUDA_ARCHS)
  set(declarations "")
  set(entries "")
  foreach(name IN LISTS names)
    string(APPEND declarations
      "namespace marlinq::cuda::${name} {\nextern const ArchKernels kKernels;\n}\n")
    list(APPEND entries "&${name}::kKernels")
  endforeach()
  list(JOIN entries ", " entries)
  file(CONFIGURE OUTPUT "${CMAKE_CURRENT_BINARY_DIR}/generated/marlinq_cuda_arch_list.hpp"
    CONTENT "#pragma once\n\n${declarations}\n#define MARLINQ_CUDA_ARCH_LIST ${entries}\n")
  target_include_directories(marlinq_cuda PRIVATE "${CMAKE_CURRENT_BINARY_DIR}/generated")
endfunction()
