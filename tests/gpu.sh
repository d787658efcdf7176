#!/usr/bin/env bash
# What needs a GPU, in one command: builds marlinq, runs the GPU tests of Python and C++, the examples, a small program
# under the tools of compute-sanitizer, and the benchmarks. Every part runs whatever failed before it; a summary tells
# all, and the exit code is 1 if any part failed.
#
# Needs nvcc, compute-sanitizer, and a python3 with torch for CUDA, pytest, and what pyproject.toml asks for to build and
# to run. GoogleTest is looked for, also under CMAKE_PREFIX_PATH; without it, its tests are reported as not run.
#   ARCHS    CMAKE_CUDA_ARCHITECTURES (default: those of this machine)
#   WORK     where to build (default: a temporary directory, removed at the end)
#   RESULTS  a directory for the benchmarks as JSON
# Arguments go to pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD
archs=${ARCHS:-$(tests/archs.sh)}
if [ -n "${WORK:-}" ]; then
  work=$WORK
  mkdir -p "$work"
else
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi
site=$work/site
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
summary=()
failed=0

# part NAME COMMAND... runs a command, or a function that stops at its first failure, and notes how it went.
part() {
  local name=$1 start=$SECONDS status
  shift
  printf '\n=== %s\n' "$name"
  (set -e; "$@")
  status=$?
  [ $status = 0 ] || failed=1
  summary+=("$([ $status = 0 ] && echo ok || echo "FAILED ($status)"): $name, $((SECONDS - start)) s")
}

not_run() {
  printf '\n!!! NOT RUN: %s\n' "$1"
  summary+=("NOT RUN: $1")
}

# Looks for GoogleTest.
googletest() {
  mkdir -p "$work/find" &&
    printf '%s\n' 'cmake_minimum_required(VERSION 3.26)' 'project(find CXX)' 'find_package(GTest REQUIRED)' \
      >"$work/find/CMakeLists.txt" &&
    cmake -S "$work/find" -B "$work/find/build" -G Ninja >/dev/null 2>&1
}

# The package, and in the same build what else is compiled against its sources.
install() {
  rm -rf "$site"
  python3 -m pip install -q --no-build-isolation --no-deps --target "$site" \
    --config-settings=cmake.define.MARLINQ_BUILD_CUDA=ON \
    --config-settings=cmake.define.MARLINQ_BUILD_BENCH=ON \
    "--config-settings=cmake.define.MARLINQ_BUILD_TESTS=$cpp_tests" \
    "--config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=$archs" \
    --config-settings=cmake.define.CMAKE_CUDA_FLAGS=-lineinfo --config-settings=build-dir="$work/build" .
  python3 -m marlinq info
  python3 -c "import marlinq; assert 'cuda:0' in marlinq.info()['devices'], 'no CUDA device'"
}

cpp_tests() {
  ctest --test-dir "$work/build" -L gpu --output-on-failure --no-tests=error
}

# Builds a project of ours against what was installed.
build_against_site() {
  cmake -S "$root/$1" -B "$work/$2" -G Ninja "-Dmarlinq_DIR=$(python3 -m marlinq --cmake-dir)" \
    -DCMAKE_BUILD_TYPE=Release >/dev/null
  cmake --build "$work/$2"
}

example() {
  build_against_site "cpp/examples/$1" "$1"
  "$work/$1/$1" | tee "$work/$1/output"
  grep -q "on cuda:0" "$work/$1/output"
  grep -q "y = 36 72" "$work/$1/output"
}

sanitized_program() {
  build_against_site tests/cpp/cuda sanitize
  "$work/sanitize/test_cuda_sanitize"
}

sanitize() {
  timeout 150 "$sanitizer" --tool "$1" --error-exitcode 1 "${@:2}" "$work/sanitize/test_cuda_sanitize"
}

# racecheck does not know that an mbarrier orders what cp.async.bulk writes for other warps, and reports every such copy
# (sm90's tile kernels hand codes and group records over in that way). Reports whose writes are all of
# ptx::bulk_copy are shown; any other counts.
racecheck() {
  local status=0
  sanitize racecheck >"$work/racecheck" 2>&1 || status=$?
  cat "$work/racecheck"
  [ $status != 0 ] || return 0
  grep -q "RACECHECK SUMMARY" "$work/racecheck" && grep -q "Race reported" "$work/racecheck" || return 1
  if grep -q "^WRONG" "$work/racecheck"; then return 1; fi
  if grep -E "(Race reported between|and) Write access at" "$work/racecheck" | grep -qv "ptx::bulk_copy("; then return 1; fi
}

# RESULTS/NAME has what a command prints.
keep() {
  local name=$1
  shift
  if [ -n "${RESULTS:-}" ]; then
    mkdir -p "$RESULTS"
    "$@" | tee "$RESULTS/$name"
  else
    "$@"
  fi
}

cpp_tests=OFF
if googletest; then cpp_tests=ON; fi
part "build for $archs" install
part "Python tests" python3 -m pytest -q -p no:cacheprovider tests/python/test_cuda*.py "$@"
if [ $cpp_tests = ON ]; then
  part "C++ tests" cpp_tests
else
  not_run "C++ tests: GoogleTest was not found; CMAKE_PREFIX_PATH may name where it is"
fi
for name in embed_cuda embed_moe; do part "$name" example $name; done
part "the program for the sanitizers, without one" sanitized_program
if [ -x "$sanitizer" ]; then
  part "memcheck" sanitize memcheck --leak-check full
  part "racecheck" racecheck
  for tool in synccheck initcheck; do part "$tool" sanitize $tool; done
else
  not_run "memcheck, racecheck, synccheck, initcheck: there is no compute-sanitizer"
  failed=1
fi
part "bench" keep bench.json python3 -m marlinq bench --device cuda --rows 1,16,64,256 --seconds 0.1 --json
part "bench of blocks" keep bench_moe.json python3 -m marlinq bench --device cuda --moe --rows 1,16,64,256,1024 \
  --seconds 0.1 --json
part "loading" keep load.json "$work/build/tests/bench/load_layers"
for program in "$work"/build/tests/bench/sm*_plans; do
  name=$(basename "$program")
  part "$name" keep "$name.csv" "$program" fp16 4096x4096 m=1,16,64,1024
done
program=$work/build/tests/bench/sm90_experts
if [ -e "$program" ]; then
  part "products over experts of sm90, against float64" keep sm90_experts_check.csv "$program" check
  part "sm90_experts" keep sm90_experts.csv "$program" uniform qwen 256 1024 rows=1
fi

printf '\n=== summary, %s s\n' "$SECONDS"
printf '%s\n' "${summary[@]}"
exit $failed
