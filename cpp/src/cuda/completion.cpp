#include "cuda/completion.hpp"

#include <cuda_runtime_api.h>

#include <atomic>
#include <utility>

#include "cuda/cuda_check.hpp"
#include "cuda/handles.hpp"

namespace marlinq::cuda {

struct Completion::State {
  OwnedEvent event;
  std::atomic<bool> ended = false;
};

Completion::Completion() noexcept = default;
Completion::Completion(std::unique_ptr<State> state) noexcept : state_(std::move(state)) {}
Completion::Completion(Completion&&) noexcept = default;
Completion& Completion::operator=(Completion&& other) noexcept {
  std::swap(state_, other.state_);
  return *this;
}

Completion Completion::of(void* stream) {
  auto state = std::make_unique<State>();
  MARLINQ_CUDA_CHECK(cudaEventRecord(state->event.get(), static_cast<cudaStream_t>(stream)));
  return Completion(std::move(state));
}

Completion::~Completion() {
  if (state_ == nullptr || state_->ended.load(std::memory_order_acquire)) return;
  // At process exit the driver may be gone, and errors mean nothing here.
  const RelaxedCapture relaxed;
  (void)cudaEventSynchronize(state_->event.get());
}

void Completion::precede(void* stream_pointer) const {
  if (state_ == nullptr || state_->ended.load(std::memory_order_acquire)) return;
  auto* stream = static_cast<cudaStream_t>(stream_pointer);
  // The event is none of the captures that may be under way, here or on other threads.
  const RelaxedCapture relaxed;
  const cudaError_t status = cudaEventQuery(state_->event.get());
  if (status != cudaErrorNotReady) {
    MARLINQ_CUDA_CHECK(status);
    state_->ended.store(true, std::memory_order_release);
    return;
  }
  (void)cudaGetLastError();  // not ready is no error
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  MARLINQ_CUDA_CHECK(cudaStreamIsCapturing(stream, &capture));
  if (capture == cudaStreamCaptureStatusNone) {
    MARLINQ_CUDA_CHECK(cudaStreamWaitEvent(stream, state_->event.get(), 0));
  } else {
    wait();
  }
}

void Completion::wait() const {
  if (state_ == nullptr || state_->ended.load(std::memory_order_acquire)) return;
  const RelaxedCapture relaxed;
  MARLINQ_CUDA_CHECK(cudaEventSynchronize(state_->event.get()));
  state_->ended.store(true, std::memory_order_release);
}

}  // namespace marlinq::cuda
