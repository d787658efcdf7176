# Installs the library, its headers and find_package(marlinq). In a wheel everything lies inside the
# Python package.
include(CMakePackageConfigHelpers)

if(SKBUILD)
  set(include_dir marlinq/include)
  set(library_dir marlinq/lib)
else()
  set(include_dir ${CMAKE_INSTALL_INCLUDEDIR})
  set(library_dir ${CMAKE_INSTALL_LIBDIR})
endif()
set(config_dir ${library_dir}/cmake/marlinq)

install(TARGETS marlinq EXPORT marlinqTargets
  LIBRARY DESTINATION ${library_dir}
  FILE_SET HEADERS DESTINATION ${include_dir})
install(EXPORT marlinqTargets NAMESPACE marlinq:: DESTINATION ${config_dir})

set(MARLINQ_COMPONENTS ${backends})
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/marlinqConfig.cmake.in
  "${CMAKE_CURRENT_BINARY_DIR}/marlinqConfig.cmake" INSTALL_DESTINATION ${config_dir})
write_basic_package_version_file("${CMAKE_CURRENT_BINARY_DIR}/marlinqConfigVersion.cmake"
  COMPATIBILITY SameMinorVersion)
install(FILES
  "${CMAKE_CURRENT_BINARY_DIR}/marlinqConfig.cmake"
  "${CMAKE_CURRENT_BINARY_DIR}/marlinqConfigVersion.cmake"
  DESTINATION ${config_dir})
