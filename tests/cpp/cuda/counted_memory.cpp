// Counts what the CUDA runtime allocates: the linker puts these in the place of its functions
// (--wrap), so that nothing of the library knows of them.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <mutex>

#include "cuda/device_memory.hpp"

namespace {

using marlinq::test::Allocations;
using marlinq::test::MemoryKind;

struct Sizes {
  std::mutex mutex;
  std::map<void*, std::int64_t> of;  // what is allocated
};

Sizes& sizes() {
  static Sizes instance;
  return instance;
}

template <class Allocate>
cudaError_t allocate(MemoryKind kind, void** memory, std::size_t bytes, const Allocate& real) {
  const auto size = static_cast<std::int64_t>(bytes);
  if (Allocations::fails(kind, size)) return cudaErrorMemoryAllocation;
  const cudaError_t status = real();
  if (status != cudaSuccess) return status;
  Allocations::add(kind, size);
  const std::lock_guard lock(sizes().mutex);
  sizes().of[*memory] = size;
  return status;
}

// Before it is freed: another thread may get the same memory at once.
void forget(MemoryKind kind, void* memory) {
  const std::lock_guard lock(sizes().mutex);
  const auto found = sizes().of.find(memory);
  if (found == sizes().of.end()) return;
  Allocations::remove(kind, found->second);
  sizes().of.erase(found);
}

}  // namespace

extern "C" {

cudaError_t __real_cudaMalloc(void** memory, std::size_t bytes);
cudaError_t __real_cudaFree(void* memory);
cudaError_t __real_cudaHostAlloc(void** memory, std::size_t bytes, unsigned flags);
cudaError_t __real_cudaFreeHost(void* memory);

cudaError_t __wrap_cudaMalloc(void** memory, std::size_t bytes) {
  return allocate(MemoryKind::kDevice, memory, bytes,
                  [=] { return __real_cudaMalloc(memory, bytes); });
}

cudaError_t __wrap_cudaFree(void* memory) {
  forget(MemoryKind::kDevice, memory);
  return __real_cudaFree(memory);
}

cudaError_t __wrap_cudaHostAlloc(void** memory, std::size_t bytes, unsigned flags) {
  return allocate(MemoryKind::kPinned, memory, bytes,
                  [=] { return __real_cudaHostAlloc(memory, bytes, flags); });
}

cudaError_t __wrap_cudaFreeHost(void* memory) {
  forget(MemoryKind::kPinned, memory);
  return __real_cudaFreeHost(memory);
}

}  // extern "C"
