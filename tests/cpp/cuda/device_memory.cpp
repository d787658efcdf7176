#include "cuda/device_memory.hpp"

#include <algorithm>
#include <mutex>

namespace marlinq::test {
namespace {

struct Counts {
  std::mutex mutex;
  std::int64_t bytes = 0;
  std::int64_t peak = 0;
  std::int64_t pinned_bytes = 0;
  std::int64_t pinned_limit = 0;
  int until_failure = 0;
  int until_device_failure = 0;
};

Counts& counts() {
  static Counts instance;
  return instance;
}

template <class F>
auto with_counts(const F& f) {
  const std::lock_guard lock(counts().mutex);
  return f(counts());
}

bool counts_down(int& left) { return left > 0 && --left == 0; }

}  // namespace

std::int64_t DeviceMemory::bytes() {
  return with_counts([](Counts& c) { return c.bytes; });
}
std::int64_t DeviceMemory::peak() {
  return with_counts([](Counts& c) { return c.peak; });
}
void DeviceMemory::forget_peak() {
  with_counts([](Counts& c) { c.peak = c.bytes; });
}
std::int64_t DeviceMemory::pinned_bytes() {
  return with_counts([](Counts& c) { return c.pinned_bytes; });
}
void DeviceMemory::fail_allocation(int n) {
  with_counts([n](Counts& c) { c.until_failure = n; });
}
void DeviceMemory::fail_device_allocation(int n) {
  with_counts([n](Counts& c) { c.until_device_failure = n; });
}
void DeviceMemory::limit_pinned(std::int64_t bytes) {
  with_counts([bytes](Counts& c) { c.pinned_limit = bytes; });
}

bool Allocations::fails(MemoryKind kind, std::int64_t bytes) {
  return with_counts([=](Counts& c) {
    if (counts_down(c.until_failure)) return true;
    if (kind == MemoryKind::kDevice) return counts_down(c.until_device_failure);
    return c.pinned_limit != 0 && c.pinned_bytes + bytes > c.pinned_limit;
  });
}

void Allocations::add(MemoryKind kind, std::int64_t bytes) {
  with_counts([=](Counts& c) {
    (kind == MemoryKind::kDevice ? c.bytes : c.pinned_bytes) += bytes;
    c.peak = std::max(c.peak, c.bytes);
  });
}

void Allocations::remove(MemoryKind kind, std::int64_t bytes) { add(kind, -bytes); }

}  // namespace marlinq::test
