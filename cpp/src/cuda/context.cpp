#include "cuda/context.hpp"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "core/matrix_checks.hpp"
#include "cuda/arch_table.hpp"
#include "cuda/cuda_check.hpp"
#include "cuda/handles.hpp"
#include "cuda/info.hpp"

namespace marlinq::cuda {
namespace {

// Rows are padded inside the scratch (to whole chunks of K, and groups to whole steps of 16), by
// less than this factor for groups of 16 rows and more and any K of 64 and more; small ones fit the
// floor.
constexpr std::int64_t kGatherSlack = 2;
constexpr std::int64_t kGatherFloor = std::int64_t{1} << 20;

void check_device(int device) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    (void)cudaGetLastError();
    throw Error(ErrorCode::kDevice, concat("device 'cuda:", device, "': ", why_no_devices(status)));
  }
  if (device < 0 || device >= count) {
    throw Error(ErrorCode::kDevice,
                concat("device 'cuda:", device, "': there are ", count, " CUDA devices"));
  }
}

}  // namespace

DeviceLimits device_limits(int device) {
  const auto attribute = [device](cudaDeviceAttr which) {
    int value = 0;
    MARLINQ_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
    return value;
  };
  return {.multiprocessors = attribute(cudaDevAttrMultiProcessorCount),
          .shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          .multiprocessor_shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          .capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                        attribute(cudaDevAttrComputeCapabilityMinor),
          // Two transfers a cycle, in kHz and bits.
          .memory_rate = static_cast<std::int32_t>(2e-6 * attribute(cudaDevAttrMemoryClockRate) *
                                                   attribute(cudaDevAttrGlobalMemoryBusWidth) / 8)};
}

ContextState::~ContextState() {
  const RelaxedCapture relaxed;
  uploader.reset();
}

bool ContextState::capturing() const {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  MARLINQ_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

void* ContextState::grow_gather(std::int64_t elements) {
  if (gather.size() >= elements) return gather.data();
  if (capturing()) {
    throw Error(ErrorCode::kInvalidArgument,
                concat("graph capture: the gather scratch holds ", gather.size(),
                       " elements and this forward needs ", elements,
                       "; call pregrow_marlin_gather_scratch(", elements, ") before the capture"));
  }
  CudaBuffer larger(device, DType::kFloat16, elements);
  if (captured) retired.push_back(std::move(gather));
  gather = std::move(larger);  // frees the old one, after the device has finished with it, unless a
                               // graph may use it
  ++scratch_allocations;
  return gather.data();
}

SplitScratch ContextState::split_scratch() const noexcept {
  return {.partials = static_cast<float*>(partials.data()),
          .flags = static_cast<std::uint32_t*>(flags.data())};
}

Uploader& ContextState::uploads() {
  if (uploader == nullptr) uploader = std::make_unique<Uploader>(device);
  return *uploader;
}

CudaContext::CudaContext(int device, void* stream) : state_(std::make_unique<ContextState>()) {
  check_device(device);
  const DeviceGuard guard(device);
  state_->device = device;
  state_->stream = static_cast<cudaStream_t>(stream);
  state_->limits = device_limits(device);
  std::int64_t floats = 0;
  std::int32_t flags = 0;
  for (const ArchKernels* arch : arch_kernels()) {
    std::int64_t need_floats = 0;
    std::int32_t need_flags = 0;
    arch->scratch_need(state_->limits, need_floats, need_flags);
    floats = std::max(floats, need_floats);
    flags = std::max(flags, need_flags);
  }
  state_->partials = CudaBuffer(device, DType::kFloat32, floats);
  state_->flags = CudaBuffer(device, DType::kInt32, flags);
  // On a stream of its own: a context may be opened while another stream is captured.
  const RelaxedCapture relaxed;
  const OwnedStream own;
  MARLINQ_CUDA_CHECK(
      cudaMemsetAsync(state_->flags.data(), 0, static_cast<std::size_t>(flags) * 4, own.get()));
  MARLINQ_CUDA_CHECK(cudaStreamSynchronize(own.get()));
}

CudaContext::CudaContext(CudaContext&&) noexcept = default;
CudaContext& CudaContext::operator=(CudaContext&&) noexcept = default;
CudaContext::~CudaContext() = default;

Device CudaContext::device() const noexcept { return {DeviceKind::kCuda, state_->device}; }
void* CudaContext::stream() const noexcept { return state_->stream; }
void CudaContext::set_stream(void* stream) noexcept {
  state_->stream = static_cast<cudaStream_t>(stream);
}
int CudaContext::threads() const noexcept { return 1; }
std::int64_t CudaContext::scratch_allocations() const noexcept {
  return state_->scratch_allocations;
}

}  // namespace marlinq::cuda

namespace marlinq {

void CudaBackend::pregrow_marlin_gather_scratch(Context& context, std::int64_t required_elements) {
  if (required_elements < 0) {
    refuse_argument(concat("required_elements: ", required_elements, ", expected at least 0"));
  }
  if (required_elements > 0) {
    context.state().grow_gather(
        std::max(required_elements * cuda::kGatherSlack, cuda::kGatherFloor));
  }
}

}  // namespace marlinq
