#!/bin/sh
# What needs a GPU, in one command: builds marlinq, runs the GPU tests, and a small set of them under compute-sanitizer.
# Needs nvcc, GoogleTest, CMake with Ninja, and a python3 that has torch for CUDA, pytest and what pyproject.toml asks for
# to build and to run. BUILD_DIR says where to build the C++ tests (default: build/gpu).
set -eu
cd "$(dirname "$0")/.."
site=${SITE:-$(mktemp -d)}
python3 -m pip install -q --no-build-isolation --no-deps --target "$site" --config-settings=cmake.define.MARLINQ_BUILD_CUDA=ON .
PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
python3 -m marlinq info
python3 -m pytest -q tests/python/test_cuda.py "$@"

build=${BUILD_DIR:-build/gpu}
cmake -S . -B "$build" -G Ninja -DMARLINQ_BUILD_CUDA=ON
cmake --build "$build" --target test_gpu
ctest --test-dir "$build" --output-on-failure -L gpu

# Kernels of marlinq alone: torch's own are not ours to judge.
for tool in memcheck racecheck synccheck initcheck; do
  echo "compute-sanitizer, $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-name regex=marlinq \
    python3 -m pytest -q -p no:cacheprovider tests/python/test_cuda.py -k "types_of_outputs or formats and 24 and 4"
done
