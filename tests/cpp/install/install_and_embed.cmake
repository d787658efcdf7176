# Installs the build into an empty prefix, then builds and runs a stranger's project against it: cpp/examples/<EXAMPLE>.
# Wants MARLINQ_BINARY_DIR, EXAMPLES, EXAMPLE, WORK, GENERATOR, COMPILER, BUILD_TYPE, VERSION. What needs a device says
# "device: ..." where there is none, and has been built then, but not run.
file(REMOVE_RECURSE "${WORK}")
execute_process(COMMAND "${CMAKE_COMMAND}" --install "${MARLINQ_BINARY_DIR}" --prefix "${WORK}/prefix"
  OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND "${CMAKE_COMMAND}" -S "${EXAMPLES}/${EXAMPLE}" -B "${WORK}/build" -G "${GENERATOR}"
  "-DCMAKE_PREFIX_PATH=${WORK}/prefix" "-DCMAKE_CXX_COMPILER=${COMPILER}" "-DCMAKE_BUILD_TYPE=${BUILD_TYPE}"
  COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND "${CMAKE_COMMAND}" --build "${WORK}/build" COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND "${WORK}/build/${EXAMPLE}" OUTPUT_VARIABLE output ERROR_VARIABLE error RESULT_VARIABLE result)
message("${output}${error}")
if(NOT result EQUAL 0 AND error MATCHES "^device: ")
  message("skipped: ${EXAMPLE} was built, and not run without a device")
elseif(NOT result EQUAL 0 OR NOT output MATCHES "marlinq ${VERSION}" OR NOT output MATCHES "y = 36 72")
  message(FATAL_ERROR "${EXAMPLE} printed something else than expected")
endif()
