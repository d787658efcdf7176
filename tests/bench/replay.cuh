// The clock of the programs that time kernels.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

#include "cuda/cuda_check.hpp"

namespace marlinq::bench {

/// What one run(i) takes, in us: the median of `replays` replays of a graph of run(0) to run(launches - 1), which
/// put kernels into the stream, without the first `left_out` of them. One more replay comes before them all.
template <class F>
double time_us(cudaStream_t stream, int launches, int replays, int left_out, F&& run) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  MARLINQ_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < launches; ++i) run(i);
  MARLINQ_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  MARLINQ_CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin = nullptr, end = nullptr;
  MARLINQ_CUDA_CHECK(cudaEventCreate(&begin));
  MARLINQ_CUDA_CHECK(cudaEventCreate(&end));
  std::vector<double> times;
  for (int i = 0; i <= replays; ++i) {
    MARLINQ_CUDA_CHECK(cudaEventRecord(begin, stream));
    MARLINQ_CUDA_CHECK(cudaGraphLaunch(exec, stream));
    MARLINQ_CUDA_CHECK(cudaEventRecord(end, stream));
    MARLINQ_CUDA_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    MARLINQ_CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i > left_out) times.push_back(static_cast<double>(ms) * 1e3 / launches);
  }
  MARLINQ_CUDA_CHECK(cudaEventDestroy(begin));
  MARLINQ_CUDA_CHECK(cudaEventDestroy(end));
  MARLINQ_CUDA_CHECK(cudaGraphExecDestroy(exec));
  MARLINQ_CUDA_CHECK(cudaGraphDestroy(graph));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

template <class F>
double time_us(cudaStream_t stream, int launches, int replays, F&& run) {
  return time_us(stream, launches, replays, 0, run);
}

}  // namespace marlinq::bench
