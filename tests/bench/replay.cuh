// The clock of the programs that time kernels.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

#include "cuda/replay.hpp"

namespace marlinq::bench {

/// What one run(i) takes, in us: the median of `replays` replays of a graph of run(0) to run(launches - 1), which
/// put kernels into the stream, without the first `left_out` of them. One more replay comes before them all.
template <class F>
double time_us(cudaStream_t stream, int launches, int replays, int left_out, F&& run) {
  cuda::Replay replay(stream, launches, run);
  std::vector<double> times;
  for (int i = 0; i <= replays; ++i) {
    const double us = replay.us();
    if (i > left_out) times.push_back(us);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

template <class F>
double time_us(cudaStream_t stream, int launches, int replays, F&& run) {
  return time_us(stream, launches, replays, 0, run);
}

}  // namespace marlinq::bench
