// Host memory of the CPU backend.
#include <cstdlib>
#include <limits>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/concat.hpp"
#include "core/integers.hpp"
#include "marlinq/cpu/cpu_backend.hpp"

namespace marlinq::cpu {
namespace {

// Weights are read once per token in order: 2 MB pages spare most of the TLB misses.
constexpr std::int64_t kHugePage = std::int64_t{2} << 20;

}  // namespace

CpuBuffer::CpuBuffer(DType dtype, std::int64_t size) : size_(size), dtype_(dtype) {
  const auto element = static_cast<std::int64_t>(size_of(dtype));
  if (size < 0 || size > std::numeric_limits<std::int64_t>::max() / element - kHugePage) {
    throw Error(ErrorCode::kOutOfMemory,
                concat("cannot allocate ", size, " elements of ", to_string(dtype)));
  }
  if (size == 0) return;
  const std::int64_t bytes = size * element;
  const std::int64_t alignment =
      bytes >= kHugePage ? kHugePage : static_cast<std::int64_t>(kAlignment);
  // Not aligned_alloc, whose size has to be a multiple of the alignment.
  if (posix_memalign(&data_, static_cast<std::size_t>(alignment),
                     static_cast<std::size_t>(bytes)) != 0) {
    data_ = nullptr;
  }
  if (data_ == nullptr) {
    throw Error(ErrorCode::kOutOfMemory,
                concat("cannot allocate ", bytes, " bytes of host memory"));
  }
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (alignment == kHugePage) {
    // A hint: where it fails, small pages serve.
    (void)madvise(data_, static_cast<std::size_t>(bytes / kHugePage * kHugePage), MADV_HUGEPAGE);
  }
#endif
}

CpuBuffer::CpuBuffer(CpuBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      dtype_(other.dtype_) {}

CpuBuffer& CpuBuffer::operator=(CpuBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(dtype_, other.dtype_);
  return *this;
}

CpuBuffer::~CpuBuffer() { std::free(data_); }

}  // namespace marlinq::cpu
