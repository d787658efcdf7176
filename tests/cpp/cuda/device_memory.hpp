// What the tests see of device and pinned memory, and how they make it run out: of the fake device
// (fake_device.cpp) or of a real one (counted_memory.cpp), which report to Allocations.
#pragma once

#include <cstdint>

namespace marlinq::test {

struct DeviceMemory {
  static std::int64_t bytes();  // allocated on devices now
  static std::int64_t peak();   // since forget_peak()
  static void forget_peak();
  static std::int64_t pinned_bytes();
  /// The n-th allocation from now on (1: the next), of a device or pinned, finds no memory. 0: none.
  static void fail_allocation(int n);
  /// The same, of a device alone.
  static void fail_device_allocation(int n);
  /// Pinned memory that may be allocated at once, from now on. 0: any.
  static void limit_pinned(std::int64_t bytes);
};

enum class MemoryKind { kDevice, kPinned };

struct Allocations {
  /// Before an allocation: whether it has to find no memory.
  static bool fails(MemoryKind kind, std::int64_t bytes);
  static void add(MemoryKind kind, std::int64_t bytes);
  static void remove(MemoryKind kind, std::int64_t bytes);
};

}  // namespace marlinq::test
