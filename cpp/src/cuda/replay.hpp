// How long kernels take that follow each other without a pause: replays of a graph.
#pragma once

#include <cuda_runtime_api.h>

#include <utility>

#include "cuda/cuda_check.hpp"

namespace marlinq::cuda {

/// A graph of launches, and the clock of its replays.
class Replay {
 public:
  /// Of run(0) to run(launches - 1), which put kernels into the stream.
  template <class F>
  Replay(cudaStream_t stream, int launches, F&& run) : stream_(stream), launches_(launches) {
    MARLINQ_CUDA_CHECK(cudaEventCreate(&begin_));
    MARLINQ_CUDA_CHECK(cudaEventCreate(&end_));
    cudaGraph_t graph = nullptr;
    MARLINQ_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    try {
      for (int i = 0; i < launches; ++i) run(i);
    } catch (...) {
      (void)cudaStreamEndCapture(stream, &graph);
      if (graph != nullptr) (void)cudaGraphDestroy(graph);
      release();
      throw;
    }
    MARLINQ_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    const cudaError_t status = cudaGraphInstantiate(&exec_, graph, 0);
    (void)cudaGraphDestroy(graph);
    MARLINQ_CUDA_CHECK(status);
  }
  Replay(Replay&& other) noexcept
      : stream_(other.stream_),
        launches_(other.launches_),
        exec_(std::exchange(other.exec_, nullptr)),
        begin_(std::exchange(other.begin_, nullptr)),
        end_(std::exchange(other.end_, nullptr)) {}
  Replay& operator=(Replay&& other) noexcept {
    std::swap(stream_, other.stream_);
    std::swap(launches_, other.launches_);
    std::swap(exec_, other.exec_);
    std::swap(begin_, other.begin_);
    std::swap(end_, other.end_);
    return *this;
  }
  ~Replay() { release(); }

  /// What a launch takes in one more replay, in us.
  double us() {
    MARLINQ_CUDA_CHECK(cudaEventRecord(begin_, stream_));
    MARLINQ_CUDA_CHECK(cudaGraphLaunch(exec_, stream_));
    MARLINQ_CUDA_CHECK(cudaEventRecord(end_, stream_));
    MARLINQ_CUDA_CHECK(cudaEventSynchronize(end_));
    float ms = 0;
    MARLINQ_CUDA_CHECK(cudaEventElapsedTime(&ms, begin_, end_));
    return static_cast<double>(ms) * 1e3 / launches_;
  }

 private:
  void release() noexcept {
    if (exec_ != nullptr) (void)cudaGraphExecDestroy(exec_);
    if (begin_ != nullptr) (void)cudaEventDestroy(begin_);
    if (end_ != nullptr) (void)cudaEventDestroy(end_);
  }

  cudaStream_t stream_;
  int launches_;
  cudaGraphExec_t exec_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

}  // namespace marlinq::cuda
