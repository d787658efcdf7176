// How long kernels take that follow each other without a pause: replays of a graph.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <type_traits>

#include "cuda/cuda_check.hpp"

namespace marlinq::cuda {

/// A graph of launches, and the clock of its replays.
class Replay {
 public:
  /// Of run(0) to run(launches - 1), which put kernels into the stream.
  template <class F>
  Replay(cudaStream_t stream, int launches, F&& run)
      : stream_(stream), launches_(launches), begin_(new_event()), end_(new_event()) {
    MARLINQ_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    cudaGraph_t captured = nullptr;
    try {
      for (int i = 0; i < launches; ++i) run(i);
    } catch (...) {
      (void)cudaStreamEndCapture(stream, &captured);
      const Graph dropped(captured);
      throw;
    }
    MARLINQ_CUDA_CHECK(cudaStreamEndCapture(stream, &captured));
    const Graph graph(captured);
    cudaGraphExec_t exec = nullptr;
    MARLINQ_CUDA_CHECK(cudaGraphInstantiate(&exec, graph.get(), 0));
    exec_.reset(exec);
  }

  /// What a launch takes in one more replay, in us.
  double us() {
    MARLINQ_CUDA_CHECK(cudaEventRecord(begin_.get(), stream_));
    MARLINQ_CUDA_CHECK(cudaGraphLaunch(exec_.get(), stream_));
    MARLINQ_CUDA_CHECK(cudaEventRecord(end_.get(), stream_));
    MARLINQ_CUDA_CHECK(cudaEventSynchronize(end_.get()));
    float ms = 0;
    MARLINQ_CUDA_CHECK(cudaEventElapsedTime(&ms, begin_.get(), end_.get()));
    return static_cast<double>(ms) * 1e3 / launches_;
  }

 private:
  struct Delete {
    void operator()(cudaGraph_t graph) const noexcept { (void)cudaGraphDestroy(graph); }
    void operator()(cudaGraphExec_t exec) const noexcept { (void)cudaGraphExecDestroy(exec); }
    void operator()(cudaEvent_t event) const noexcept { (void)cudaEventDestroy(event); }
  };
  template <class Handle>
  using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Delete>;
  using Graph = Owned<cudaGraph_t>;

  static Owned<cudaEvent_t> new_event() {
    cudaEvent_t event = nullptr;
    MARLINQ_CUDA_CHECK(cudaEventCreate(&event));
    return Owned<cudaEvent_t>(event);
  }

  cudaStream_t stream_;
  int launches_;
  Owned<cudaEvent_t> begin_, end_;
  Owned<cudaGraphExec_t> exec_;
};

}  // namespace marlinq::cuda
