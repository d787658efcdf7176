// A device that is none: streams are threads, device memory is host memory, and what a program may
// not rely on does not hold. Work of a stream is done late, copies read their source when they are
// done, memory is filled with rubbish when it comes and goes, and any call can be made to fail.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <string>

namespace marlinq::test {

struct FakeDevice {
  /// Appends work to a stream.
  static void enqueue(cudaStream_t stream, std::function<void()> work);

  /// The n-th call from now on that may fail (1: the next) returns this error; 0: none.
  static void fail_call(int n, cudaError_t error);
  /// True if it did.
  static bool has_failed();

  /// Memory of the device, from now on.
  static void limit(std::int64_t bytes);

  /// Makes a stream look as if it were being captured: it may not wait for anything outside.
  static void set_capturing(cudaStream_t stream, bool capturing);

  /// Nothing that is appended to any stream is done until it is let go.
  static void hold(bool held);

  static int calls();    // that may fail, so far
  static int buffers();  // of the device
  static int events();
  static int streams();

  /// What was done that a device would not have forgiven, such as a copy from pageable memory.
  static std::string violations();
};

}  // namespace marlinq::test
