#!/bin/sh
# Runs the C++ tests under ThreadSanitizer, over std::thread: it does not understand OpenMP's own synchronisation.
set -eu
cd "$(dirname "$0")/.."
BUILD_DIR=${BUILD_DIR:-build/tsan} exec tests/ctest.sh -DCMAKE_BUILD_TYPE=RelWithDebInfo -DMARLINQ_STD_THREAD=ON \
  -DMARLINQ_BUILD_CUDA=OFF -DMARLINQ_SANITIZE=thread "$@"
