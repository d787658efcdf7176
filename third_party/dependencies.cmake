# Finds what we use; README.md has versions, licences and reasons. Configuring never downloads.
if(MARLINQ_BUILD_PYTHON)
  find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
  find_package(pybind11 CONFIG REQUIRED)
endif()
if(MARLINQ_BUILD_TESTS)
  find_package(GTest REQUIRED)
endif()
