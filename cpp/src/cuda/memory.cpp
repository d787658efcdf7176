// Device memory for users of a context: allocation, copies from and to the host, and waiting.
#include <algorithm>
#include <cstdint>

#include "core/concat.hpp"
#include "core/refuse.hpp"
#include "cuda/context.hpp"
#include "cuda/cuda_check.hpp"
#include "marlinq/cuda/cuda_backend.hpp"

namespace marlinq {
namespace {

cudaMemcpyKind kind_of(Device from, Device to) noexcept {
  const bool from_host = from.kind == DeviceKind::kCpu;
  if (to.kind == DeviceKind::kCpu) return from_host ? cudaMemcpyHostToHost : cudaMemcpyDeviceToHost;
  return from_host ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToDevice;
}

}  // namespace

CudaBackend::Buffer CudaBackend::allocate(Context& context, DType dtype, std::int64_t size) {
  const cuda::ContextState& state = context.state();
  const cuda::DeviceGuard guard(state.device);
  Buffer buffer(state.device, dtype, size);
  if (size > 0) {
    MARLINQ_CUDA_CHECK(cudaMemsetAsync(
        buffer.data(), 0, static_cast<std::size_t>(size) * size_of(dtype), state.stream));
  }
  return buffer;
}

void CudaBackend::copy(Context& context, const ConstMatrixView& from, const MatrixView& to) {
  if (to.rows == 0 || to.cols == 0) return;
  const bool with_host = from.device.kind == DeviceKind::kCpu || to.device.kind == DeviceKind::kCpu;
  const cuda::ContextState& state = context.state();
  const cuda::DeviceGuard guard(state.device);
  // What a graph would replay is the address of memory that the caller may have freed by then.
  if (with_host && state.capturing()) {
    refuse_argument(concat("graph capture: a copy between the host and ",
                           to_string(context.device()),
                           " cannot be captured; pass arrays on the device"));
  }
  const std::size_t size = size_of(to.dtype);
  const std::size_t width = static_cast<std::size_t>(to.cols) * size;
  const auto pitch = [width, size](std::int64_t rows, std::int64_t stride) {
    return rows > 1 ? static_cast<std::size_t>(stride) * size : width;
  };
  const cuda::RelaxedCapture relaxed;
  MARLINQ_CUDA_CHECK(cudaMemcpy2DAsync(
      to.data, pitch(to.rows, to.row_stride), from.data, pitch(from.rows, from.row_stride), width,
      static_cast<std::size_t>(to.rows), kind_of(from.device, to.device), state.stream));
  if (with_host) MARLINQ_CUDA_CHECK(cudaStreamSynchronize(state.stream));
}

void CudaBackend::synchronise(Context& context) {
  const cuda::ContextState& state = context.state();
  const cuda::DeviceGuard guard(state.device);
  if (state.capturing()) {
    refuse_argument(
        "graph capture: the host cannot wait for a stream that is being captured, which arrays in "
        "host "
        "memory would need; pass arrays on the device");
  }
  const cuda::RelaxedCapture relaxed;
  MARLINQ_CUDA_CHECK(cudaStreamSynchronize(state.stream));
}

bool CudaBackend::captured(Context& context) noexcept { return context.state().captured; }

}  // namespace marlinq
