#!/bin/sh
# Everything that needs a GPU, in one command: builds marlinq, runs the GPU tests, and times the dense layers.
# Needs nvcc, and a python3 that has torch for CUDA, pytest and what pyproject.toml asks for to build and to run.
set -eu
cd "$(dirname "$0")/.."
site=${SITE:-$(mktemp -d)}
python3 -m pip install -q --no-build-isolation --no-deps --target "$site" --config-settings=cmake.define.MARLINQ_BUILD_CUDA=ON .
PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
python3 -m marlinq info
python3 -m pytest -q tests/python/test_cuda.py "$@"
