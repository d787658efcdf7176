// Device memory.
#include <cstdint>
#include <utility>

#include "cuda/cuda_check.hpp"
#include "marlinq/cuda/cuda_backend.hpp"

namespace marlinq::cuda {

CudaBuffer::CudaBuffer(int device, DType dtype, std::int64_t size)
    : size_(size), dtype_(dtype), device_(device) {
  if (size == 0) return;
  const DeviceGuard guard(device);
  const RelaxedCapture relaxed;
  const auto bytes = static_cast<std::size_t>(size) * size_of(dtype);
  const cudaError_t status = cudaMalloc(&data_, bytes);
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    throw Error(ErrorCode::kOutOfMemory,
                concat("cannot allocate ", bytes, " bytes on ", to_string(this->device())));
  }
  MARLINQ_CUDA_CHECK(status);
}

CudaBuffer::CudaBuffer(CudaBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      dtype_(other.dtype_),
      device_(other.device_) {}

CudaBuffer& CudaBuffer::operator=(CudaBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(dtype_, other.dtype_);
  std::swap(device_, other.device_);
  return *this;
}

CudaBuffer::~CudaBuffer() {
  if (data_ == nullptr) return;
  // At process exit the driver may be gone, and its memory with it: errors mean nothing here.
  int previous = 0;
  (void)cudaGetDevice(&previous);
  if (previous != device_) (void)cudaSetDevice(device_);
  {
    const RelaxedCapture relaxed;
    (void)cudaFree(data_);
  }
  if (previous != device_) (void)cudaSetDevice(previous);
}

}  // namespace marlinq::cuda
