#include "cuda/fake_device.hpp"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <set>
#include <span>
#include <thread>

#include "core/integers.hpp"
#include "cuda/arch/sm80/pack.hpp"
#include "cuda/device_memory.hpp"
#include "cuda/fetch.hpp"
#include "cuda/host_packing.hpp"
#include "support/generators.hpp"

namespace {

using marlinq::test::Allocations;
using marlinq::test::DeviceMemory;
using marlinq::test::MemoryKind;
using marlinq::test::Random;

constexpr std::int64_t kNoLimit = std::int64_t{1} << 40;

struct Stream;

struct Device {
  std::mutex mutex;  // of everything
  std::condition_variable changed;
  std::map<unsigned char*, std::int64_t> device_memory;
  std::map<unsigned char*, std::int64_t> pinned_memory;
  std::int64_t limit = kNoLimit;
  int calls_until_failure = 0;
  cudaError_t failure = cudaSuccess;
  bool failed = false;
  int calls = 0;
  bool held = false;
  std::set<Stream*> streams;
  std::set<Stream*> capturing;
  int events = 0;
  std::string violations;
};

Device& device() {
  static Device instance;
  return instance;
}

void violation(const std::string& what) { device().violations += what + "\n"; }

bool holds(const std::map<unsigned char*, std::int64_t>& memory, const void* address,
           std::int64_t bytes) {
  const auto* at = static_cast<const unsigned char*>(address);
  for (const auto& [begin, size] : memory) {
    if (at >= begin && at + bytes <= begin + size) return true;
  }
  return false;
}

struct Stream {
  std::deque<std::function<void()>> work;
  bool busy = false;
  bool ends = false;
  Random random;
  std::thread thread;

  explicit Stream(std::uint64_t seed) : random(seed) {
    thread = std::thread([this] { run(); });
  }

  void run() {
    std::unique_lock lock(device().mutex);
    for (;;) {
      device().changed.wait(
          lock, [this] { return (!work.empty() && !device().held) || (work.empty() && ends); });
      if (work.empty()) return;
      const std::function<void()> next = std::move(work.front());
      work.pop_front();
      busy = true;
      const bool late = random.chance(15);
      const auto delay = std::chrono::microseconds(random.below(100));
      lock.unlock();
      if (late) std::this_thread::sleep_for(delay);
      next();
      lock.lock();
      busy = false;
      device().changed.notify_all();
    }
  }
  bool idle() const { return work.empty() && !busy; }
};

struct Marker {
  bool passed = false;
};

struct Event {
  std::shared_ptr<Marker> last;
};

Stream* stream_of(cudaStream_t stream) { return reinterpret_cast<Stream*>(stream); }
Event* event_of(cudaEvent_t event) { return reinterpret_cast<Event*>(event); }

// Under the mutex.
void append(Stream* stream, std::function<void()> work) {
  stream->work.push_back(std::move(work));
  device().changed.notify_all();
}

// Counts a call, and says whether it is the one to fail. Under the mutex.
bool fails() {
  ++device().calls;
  if (device().calls_until_failure == 0 || --device().calls_until_failure > 0) return false;
  device().failed = true;
  return true;
}

// What a thread may not do while another one captures a graph, unless it says that it knows.
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

void expect_relaxed(const char* call) {
  if (capture_mode != cudaStreamCaptureModeRelaxed) {
    violation(std::string(call) + " would spoil the capture of another thread");
  }
}

}  // namespace

namespace marlinq::test {

void FakeDevice::enqueue(cudaStream_t stream, std::function<void()> work) {
  const std::lock_guard lock(device().mutex);
  append(stream_of(stream), std::move(work));
}
void FakeDevice::fail_call(int n, cudaError_t error) {
  const std::lock_guard lock(device().mutex);
  device().calls_until_failure = n;
  device().failure = error;
  device().failed = false;
}
bool FakeDevice::has_failed() {
  const std::lock_guard lock(device().mutex);
  return device().failed;
}
void FakeDevice::limit(std::int64_t bytes) {
  const std::lock_guard lock(device().mutex);
  device().limit = bytes == 0 ? kNoLimit : bytes;
}
void FakeDevice::set_capturing(cudaStream_t stream, bool capturing) {
  const std::lock_guard lock(device().mutex);
  if (capturing) {
    device().capturing.insert(stream_of(stream));
  } else {
    device().capturing.erase(stream_of(stream));
  }
}
void FakeDevice::hold(bool held) {
  const std::lock_guard lock(device().mutex);
  device().held = held;
  device().changed.notify_all();
}
int FakeDevice::calls() {
  const std::lock_guard lock(device().mutex);
  return device().calls;
}
int FakeDevice::buffers() {
  const std::lock_guard lock(device().mutex);
  return static_cast<int>(device().device_memory.size());
}
int FakeDevice::events() {
  const std::lock_guard lock(device().mutex);
  return device().events;
}
int FakeDevice::streams() {
  const std::lock_guard lock(device().mutex);
  return static_cast<int>(device().streams.size());
}
std::string FakeDevice::violations() {
  const std::lock_guard lock(device().mutex);
  return device().violations;
}

}  // namespace marlinq::test

// The kernels' place in a program without them.
namespace marlinq::cuda {

void sm80::pack_pieces(std::span<const PieceToPack> pieces, void* stream) {
  for (const PieceToPack& piece : pieces) {
    test::FakeDevice::enqueue(static_cast<cudaStream_t>(stream),
                              [piece] { test::pack_piece_on_host(piece); });
  }
}

void sm80::convert_scales(const ScalesToConvert& scales, void* stream) {
  test::FakeDevice::enqueue(static_cast<cudaStream_t>(stream),
                            [scales] { test::convert_scales_on_host(scales); });
}

// Writes whole units, as the kernel does.
void fetch_rows(std::span<const FetchRows> all, cudaStream_t stream) {
  const std::lock_guard lock(device().mutex);
  for (const FetchRows& r : all) {
    const std::int64_t target_bytes = round_up(r.rows * r.row_bytes, kFetchUnit);
    if (reinterpret_cast<std::uintptr_t>(r.to) % kFetchUnit != 0 ||
        (r.rows > 1 && r.row_bytes % kFetchUnit != 0)) {
      violation("a fetch to a place that is not aligned");
    }
    if (!holds(device().device_memory, r.to, target_bytes)) {
      violation("a fetch outside of the device's memory");
    }
    if (!holds(device().pinned_memory, r.from, (r.rows - 1) * r.pitch + r.row_bytes)) {
      violation("a fetch from pageable memory");
    }
    append(stream_of(stream), [r, target_bytes] {
      std::memset(r.to, 0xAB, static_cast<std::size_t>(target_bytes));
      for (std::int64_t row = 0; row < r.rows; ++row) {
        std::memcpy(r.to + row * r.row_bytes, r.from + row * r.pitch,
                    static_cast<std::size_t>(r.row_bytes));
      }
    });
  }
}

}  // namespace marlinq::cuda

// The runtime, as far as loading uses it.
extern "C" {

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "a fault";
}
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorUnknown";
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* current) {
  *current = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(capture_mode, *mode);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  const std::lock_guard lock(device().mutex);
  expect_relaxed("cudaMalloc");
  if (fails()) return device().failure;
  const auto size = static_cast<std::int64_t>(bytes);
  if (Allocations::fails(MemoryKind::kDevice, size) ||
      DeviceMemory::bytes() + size > device().limit) {
    return cudaErrorMemoryAllocation;
  }
  auto* at = static_cast<unsigned char*>(::operator new(bytes, std::align_val_t(256)));
  std::memset(at, 0xCD, bytes);
  device().device_memory[at] = size;
  Allocations::add(MemoryKind::kDevice, size);
  *memory = at;
  return cudaSuccess;
}

// As on a device, all its work ends first.
cudaError_t cudaFree(void* memory) {
  std::unique_lock lock(device().mutex);
  expect_relaxed("cudaFree");
  if (memory == nullptr) return cudaSuccess;
  device().changed.wait(lock, [] {
    return std::all_of(device().streams.begin(), device().streams.end(),
                       [](const Stream* stream) { return stream->idle(); });
  });
  auto* at = static_cast<unsigned char*>(memory);
  const std::int64_t size = device().device_memory.at(at);
  std::memset(at, 0xDD, static_cast<std::size_t>(size));
  Allocations::remove(MemoryKind::kDevice, size);
  device().device_memory.erase(at);
  ::operator delete(memory, std::align_val_t(256));
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned) {
  const std::lock_guard lock(device().mutex);
  expect_relaxed("cudaHostAlloc");
  if (fails()) return device().failure;
  const auto size = static_cast<std::int64_t>(bytes);
  if (Allocations::fails(MemoryKind::kPinned, size)) return cudaErrorMemoryAllocation;
  auto* at = static_cast<unsigned char*>(::operator new(bytes, std::align_val_t(256)));
  std::memset(at, 0xCD, bytes);
  device().pinned_memory[at] = size;
  Allocations::add(MemoryKind::kPinned, size);
  *memory = at;
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* memory) {
  const std::lock_guard lock(device().mutex);
  auto* at = static_cast<unsigned char*>(memory);
  const std::int64_t size = device().pinned_memory.at(at);
  std::memset(at, 0xDD, static_cast<std::size_t>(size));
  Allocations::remove(MemoryKind::kPinned, size);
  device().pinned_memory.erase(at);
  ::operator delete(memory, std::align_val_t(256));
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  const std::lock_guard lock(device().mutex);
  if (fails()) return device().failure;
  *attributes = {};
  attributes->type = holds(device().pinned_memory, address, 1)   ? cudaMemoryTypeHost
                     : holds(device().device_memory, address, 1) ? cudaMemoryTypeDevice
                                                                 : cudaMemoryTypeUnregistered;
  if (attributes->type == cudaMemoryTypeHost)
    attributes->devicePointer = const_cast<void*>(address);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  const std::lock_guard lock(device().mutex);
  if (fails()) return device().failure;
  if (flags != cudaStreamNonBlocking) violation("a stream that waits for the default one");
  auto* created = new Stream(device().streams.size() + 1);
  device().streams.insert(created);
  *stream = reinterpret_cast<cudaStream_t>(created);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  {
    const std::lock_guard lock(device().mutex);
    stream_of(stream)->ends = true;
    device().changed.notify_all();
  }
  stream_of(stream)->thread.join();
  const std::lock_guard lock(device().mutex);
  device().streams.erase(stream_of(stream));
  delete stream_of(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  std::unique_lock lock(device().mutex);
  expect_relaxed("cudaStreamSynchronize");
  device().changed.wait(lock, [stream] { return stream_of(stream)->idle(); });
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const std::lock_guard lock(device().mutex);
  if (fails()) return device().failure;
  *status = device().capturing.contains(stream_of(stream)) ? cudaStreamCaptureStatusActive
                                                           : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  const std::lock_guard lock(device().mutex);
  if (fails()) return device().failure;
  if ((flags & cudaEventDisableTiming) == 0) violation("an event with timing");
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  ++device().events;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const std::lock_guard lock(device().mutex);
  delete event_of(event);
  --device().events;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const std::lock_guard lock(device().mutex);
  if (fails()) return device().failure;
  auto marker = std::make_shared<Marker>();
  event_of(event)->last = marker;
  append(stream_of(stream), [marker] {
    const std::lock_guard passing(device().mutex);
    marker->passed = true;
    device().changed.notify_all();
  });
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  const std::lock_guard lock(device().mutex);
  expect_relaxed("cudaEventQuery");
  if (fails()) return device().failure;
  const std::shared_ptr<Marker>& last = event_of(event)->last;
  return last == nullptr || last->passed ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  std::unique_lock lock(device().mutex);
  expect_relaxed("cudaEventSynchronize");
  if (fails()) return device().failure;
  const std::shared_ptr<Marker> last = event_of(event)->last;
  device().changed.wait(lock, [&last] { return last == nullptr || last->passed; });
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const std::lock_guard lock(device().mutex);
  if (fails()) return device().failure;
  if (device().capturing.contains(stream_of(stream))) {
    violation("a captured stream that waits for work outside of its graph");
  }
  const std::shared_ptr<Marker> last = event_of(event)->last;
  if (last == nullptr) return cudaSuccess;
  append(stream_of(stream), [last] {
    std::unique_lock waiting(device().mutex);
    device().changed.wait(waiting, [&last] { return last->passed; });
  });
  return cudaSuccess;
}

cudaError_t cudaMemset2DAsync(void* target, std::size_t pitch, int value, std::size_t width,
                              std::size_t height, cudaStream_t stream) {
  const std::lock_guard lock(device().mutex);
  if (fails()) return device().failure;
  if (!holds(device().device_memory, target,
             static_cast<std::int64_t>((height - 1) * pitch + width))) {
    violation("a memset outside of the device's memory");
  }
  append(stream_of(stream), [=] {
    for (std::size_t row = 0; row < height; ++row) {
      std::memset(static_cast<unsigned char*>(target) + row * pitch, value, width);
    }
  });
  return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void* target, std::size_t target_pitch, const void* source,
                              std::size_t source_pitch, std::size_t width, std::size_t height,
                              cudaMemcpyKind kind, cudaStream_t stream) {
  const std::lock_guard lock(device().mutex);
  if (fails()) return device().failure;
  const auto extent = [width, height](std::size_t pitch) {
    return static_cast<std::int64_t>((height - 1) * pitch + width);
  };
  if (kind != cudaMemcpyHostToDevice) violation("a copy that is not to the device");
  if (!holds(device().device_memory, target, extent(target_pitch))) {
    violation("a copy outside of the device's memory");
  }
  if (!holds(device().pinned_memory, source, extent(source_pitch))) {
    violation("an asynchronous copy from pageable memory");
  }
  append(stream_of(stream), [=] {
    for (std::size_t row = 0; row < height; ++row) {
      std::memcpy(static_cast<unsigned char*>(target) + row * target_pitch,
                  static_cast<const unsigned char*>(source) + row * source_pitch, width);
    }
  });
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, std::size_t bytes,
                            cudaMemcpyKind kind, cudaStream_t stream) {
  return cudaMemcpy2DAsync(target, bytes, source, bytes, bytes, 1, kind, stream);
}

// Only back to the host: the tests look at what was loaded.
cudaError_t cudaMemcpy(void* target, const void* source, std::size_t bytes, cudaMemcpyKind) {
  std::memcpy(target, source, bytes);
  return cudaSuccess;
}

}  // extern "C"
