// Counts what the CUDA runtime allocates: the linker puts these in the place of its functions
// (--wrap), so that nothing of the library knows of them.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>

#include "cuda/device_memory.hpp"

namespace marlinq::test {
namespace {

struct Allocations {
  std::mutex mutex;
  std::map<void*, std::int64_t> device;
  std::map<void*, std::int64_t> pinned;
  std::int64_t bytes = 0;
  std::int64_t peak = 0;
  std::int64_t pinned_bytes = 0;
  int until_failure = 0;
  int until_device_failure = 0;
  std::int64_t pinned_limit = 0;

  static bool counts_down(int& left) { return left > 0 && --left == 0; }
  bool pinned_fails(std::size_t more) {
    const bool full =
        pinned_limit != 0 && pinned_bytes + static_cast<std::int64_t>(more) > pinned_limit;
    return counts_down(until_failure) || full;
  }
  bool device_fails() { return counts_down(until_failure) || counts_down(until_device_failure); }
};

Allocations& all() {
  static Allocations allocations;
  return allocations;
}

}  // namespace

std::int64_t DeviceMemory::bytes() {
  const std::lock_guard lock(all().mutex);
  return all().bytes;
}
std::int64_t DeviceMemory::peak() {
  const std::lock_guard lock(all().mutex);
  return all().peak;
}
void DeviceMemory::forget_peak() {
  const std::lock_guard lock(all().mutex);
  all().peak = all().bytes;
}
std::int64_t DeviceMemory::pinned_bytes() {
  const std::lock_guard lock(all().mutex);
  return all().pinned_bytes;
}
void DeviceMemory::fail_allocation(int n) {
  const std::lock_guard lock(all().mutex);
  all().until_failure = n;
}
void DeviceMemory::fail_device_allocation(int n) {
  const std::lock_guard lock(all().mutex);
  all().until_device_failure = n;
}
void DeviceMemory::limit_pinned(std::int64_t bytes) {
  const std::lock_guard lock(all().mutex);
  all().pinned_limit = bytes;
}

}  // namespace marlinq::test

extern "C" {

using marlinq::test::all;

cudaError_t __real_cudaMalloc(void** memory, std::size_t bytes);
cudaError_t __real_cudaFree(void* memory);
cudaError_t __real_cudaHostAlloc(void** memory, std::size_t bytes, unsigned flags);
cudaError_t __real_cudaFreeHost(void* memory);

cudaError_t __wrap_cudaMalloc(void** memory, std::size_t bytes) {
  {
    const std::lock_guard lock(all().mutex);
    if (all().device_fails()) return cudaErrorMemoryAllocation;
  }
  const cudaError_t status = __real_cudaMalloc(memory, bytes);
  if (status != cudaSuccess) return status;
  const std::lock_guard lock(all().mutex);
  all().device[*memory] = static_cast<std::int64_t>(bytes);
  all().bytes += static_cast<std::int64_t>(bytes);
  all().peak = std::max(all().peak, all().bytes);
  return status;
}

cudaError_t __wrap_cudaFree(void* memory) {
  {
    const std::lock_guard lock(all().mutex);
    const auto found = all().device.find(memory);
    if (found != all().device.end()) {
      all().bytes -= found->second;
      all().device.erase(found);
    }
  }
  return __real_cudaFree(memory);
}

cudaError_t __wrap_cudaHostAlloc(void** memory, std::size_t bytes, unsigned flags) {
  {
    const std::lock_guard lock(all().mutex);
    if (all().pinned_fails(bytes)) return cudaErrorMemoryAllocation;
  }
  const cudaError_t status = __real_cudaHostAlloc(memory, bytes, flags);
  if (status != cudaSuccess) return status;
  const std::lock_guard lock(all().mutex);
  all().pinned[*memory] = static_cast<std::int64_t>(bytes);
  all().pinned_bytes += static_cast<std::int64_t>(bytes);
  return status;
}

cudaError_t __wrap_cudaFreeHost(void* memory) {
  {
    const std::lock_guard lock(all().mutex);
    const auto found = all().pinned.find(memory);
    if (found != all().pinned.end()) {
      all().pinned_bytes -= found->second;
      all().pinned.erase(found);
    }
  }
  return __real_cudaFreeHost(memory);
}

}  // extern "C"
