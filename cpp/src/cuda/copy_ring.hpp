// Pageable host memory on its way to a device: threads copy it into pinned slots, and the bus takes
// the slots. One core copies a fifth of what the bus takes.
#pragma once

#include <cuda_runtime_api.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "cuda/handles.hpp"
#include "cuda/raw_pieces.hpp"

namespace marlinq::cuda {

struct RingSizes {
  /// 10 us of the bus, which hides what it costs to ask for a copy, and 50 us of a core, which is how
  /// long the first bytes take to come.
  std::int64_t slot_bytes = std::int64_t{512} << 10;
  std::size_t slots = 32;  // at most; 300 us of the bus
  /// At most. With the caller's own, 8 cores copy faster than any bus takes.
  unsigned threads = 7;
};

/// Pinned memory comes as it is needed, and threads with the first batch: no more than half of what
/// the machine runs at once. Both go with the ring. One thread calls the functions.
class CopyRing {
 public:
  /// Copies that were started together.
  struct Batch {
    unsigned char* target = nullptr;  // on the device; offsets of rows are from here
    std::vector<RawRows> rows;        // by offset
    cudaEvent_t after = nullptr;      // no copy starts before it

   private:
    friend class CopyRing;
    std::mutex opening;
    bool opened = false;
    std::int64_t pending = 0;  // jobs; this and what follows: under the ring's mutex
    std::exception_ptr error;
  };

  /// For `stream` of the current device.
  CopyRing(int device, cudaStream_t stream, const RingSizes& sizes)
      : device_(device), stream_(stream), sizes_(sizes) {}
  CopyRing(const CopyRing&) = delete;
  CopyRing& operator=(const CopyRing&) = delete;
  ~CopyRing();

  /// Makes the stream wait for batch.after, if it does not yet; for copies that go past the ring.
  void open(Batch& batch);

  /// Starts to copy batch.rows. The batch stays where it is until wait() or cancel().
  void start(Batch& batch);

  /// Helps until all copies of the batch are on the stream: its host memory is no longer needed.
  /// Throws what a copy threw: out_of_memory or device.
  void wait(Batch& batch);

  /// Drops copies that have not begun, and waits for those that have.
  void cancel(Batch& batch) noexcept;

  /// Copies `bytes` to the device on a stream of the caller's; the source is free on return.
  void put(void* target, const void* source, std::int64_t bytes, cudaStream_t stream);

 private:
  struct Slot {
    unsigned char* memory = nullptr;
    OwnedEvent read{cudaEventBlockingSync};  // by the bus, the last time
  };

  // Bytes [begin, end) of a batch's target.
  struct Job {
    Batch* batch = nullptr;
    std::int64_t begin = 0;
    std::int64_t end = 0;
  };

  struct PinnedDeleter {
    void operator()(unsigned char* memory) const noexcept { (void)cudaFreeHost(memory); }
  };

  void start_threads();
  void work() noexcept;
  void run(const Job& job) noexcept;
  void copy(const Job& job);
  Slot& take_slot();
  // Ends the use of the slot.
  void send(Slot& slot, unsigned char* target, std::int64_t bytes, cudaStream_t stream);
  void give_back(Slot& slot) noexcept;
  bool grow();

  int device_;
  cudaStream_t stream_;
  RingSizes sizes_;

  std::mutex mutex_;
  std::condition_variable job_came_;
  std::condition_variable batch_ended_;
  std::condition_variable slot_came_;
  std::deque<Job> jobs_;
  std::vector<std::unique_ptr<unsigned char, PinnedDeleter>> memory_;
  std::deque<Slot> slots_;
  std::deque<Slot*> free_;  // the longest unused first
  bool limited_ = false;    // no more pinned memory is to be had
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace marlinq::cuda
