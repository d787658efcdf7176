// Errors of the CUDA runtime as marlinq::Error, and the guard that selects a device for a scope.
#pragma once

#include <cuda_runtime_api.h>

#include <source_location>

#include "core/concat.hpp"
#include "marlinq/error.hpp"

namespace marlinq::cuda {

[[noreturn]] inline void throw_cuda_error(cudaError_t status, const char* what,
                                          std::source_location where) {
  (void)
      cudaGetLastError();  // an error that is not sticky must not be reported again by a later call
  const ErrorCode code =
      status == cudaErrorMemoryAllocation ? ErrorCode::kOutOfMemory : ErrorCode::kDevice;
  throw Error(code,
              concat(what, ": ", cudaGetErrorString(status), " (", cudaGetErrorName(status), ")"),
              where);
}

#define MARLINQ_CUDA_CHECK(call)                                                                 \
  do {                                                                                           \
    const cudaError_t marlinq_status = (call);                                                   \
    if (marlinq_status != cudaSuccess) {                                                         \
      ::marlinq::cuda::throw_cuda_error(marlinq_status, #call, std::source_location::current()); \
    }                                                                                            \
  } while (0)

/// Makes a device current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    MARLINQ_CUDA_CHECK(cudaGetDevice(&previous_));
    if (previous_ != device) MARLINQ_CUDA_CHECK(cudaSetDevice(device));
    current_ = device;
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (previous_ != current_) (void)cudaSetDevice(previous_);
  }

 private:
  int previous_ = 0;
  int current_ = 0;
};

/// Allows allocation, freeing and waiting on this thread while another one captures a graph. For
/// destructors too: where the driver is gone, it does nothing.
class RelaxedCapture {
 public:
  RelaxedCapture() noexcept { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;
  ~RelaxedCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace marlinq::cuda
