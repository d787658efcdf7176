#!/bin/sh
# Builds the C++ tests and runs them with ctest; installs GoogleTest from the system's packages where it is missing.
# Arguments go to CMake's configure step, after those of CMAKE_ARGS. BUILD_DIR says where to build (default:
# build/tests). Tests that need a GPU are built where a CUDA compiler is, for the GPUs of this machine or CUDAARCHS alone,
# and skip where there is no GPU.
set -eu
cd "$(dirname "$0")/.."
build=${BUILD_DIR:-build/tests}
if [ ! -e /usr/include/gtest/gtest.h ] && command -v apt-get >/dev/null; then
  as_root=$([ "$(id -u)" = 0 ] || echo sudo)
  $as_root apt-get update -qq
  $as_root apt-get install -y -qq libgtest-dev
fi
cmake -S . -B "$build" -G Ninja -DMARLINQ_BUILD_TESTS=ON "-DCMAKE_CUDA_ARCHITECTURES=$(tests/archs.sh)" \
  ${CMAKE_ARGS:-} "$@"
cmake --build "$build"
ctest --test-dir "$build" --output-on-failure --no-tests=error -j "$(nproc)"
