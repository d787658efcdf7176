// Pageable host memory on its way to a device: threads copy it into pinned slots, and the bus takes
// the slots. One core copies a fifth of what the bus takes.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "cuda/handles.hpp"
#include "cuda/raw_pieces.hpp"

namespace marlinq::cuda {

struct RingSizes {
  /// 100 us of a core, beside which it is little what a copy costs to ask for and to wait for. The
  /// two slots of a core stay in its cache.
  std::int64_t slot_bytes = std::int64_t{1} << 20;
  /// With the caller's own, 8 cores copy nearly as fast as any bus takes. No more than half of what
  /// the machine runs at once.
  unsigned threads = std::min(7U, std::thread::hardware_concurrency() / 2);
};

/// Every thread has pinned slots of its own and shares nothing but the list of jobs. Pinned memory
/// comes when it is needed: the caller's first, that of the threads and they themselves with the
/// first batch which is worth it; where it runs short there are fewer threads, or none. All go with
/// the ring. One thread calls the functions.
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
    std::atomic<std::int64_t> pending{0};  // jobs; changes under the ring's mutex
    std::exception_ptr error;              // under the ring's mutex
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

  /// Copies `bytes` to `count` places on the device, `pitch` bytes apart, on a stream of the caller's;
  /// the source is free on return.
  void put(void* target, const void* source, std::int64_t bytes, std::int64_t count,
           std::int64_t pitch, cudaStream_t stream);

 private:
  struct Slot {
    unsigned char* memory = nullptr;
    OwnedEvent read;  // by the bus, the last time
  };

  // The slots of one thread, used in turn: it fills one while the bus reads the other.
  class Copier {
   public:
    static constexpr std::int64_t kSlots = 2;
    Copier(unsigned char* memory, std::int64_t slot_bytes);
    // Waits until the slot may be filled.
    Slot& next_slot();
    void wait() const noexcept;

   private:
    std::array<Slot, kSlots> slots_;
    std::size_t next_ = 0;
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
  using PinnedMemory = std::unique_ptr<unsigned char, PinnedDeleter>;

  std::int64_t bytes_of(std::size_t copiers) const noexcept {
    return static_cast<std::int64_t>(copiers) * Copier::kSlots * sizes_.slot_bytes;
  }
  // Null where there is no such memory.
  PinnedMemory pin(std::size_t copiers) const;
  Copier& own();
  void start_threads();
  std::int64_t job_bytes(std::int64_t bytes) const noexcept;
  void work(Copier& copier) noexcept;
  std::optional<Job> take_job();
  void run(const Job& job, Copier& copier) noexcept;
  void copy(const Job& job, Copier& copier);
  void send(Slot& slot, unsigned char* target, std::int64_t bytes, cudaStream_t stream,
            std::int64_t rows = 1, std::int64_t pitch = 0);

  int device_;
  cudaStream_t stream_;
  RingSizes sizes_;

  std::mutex mutex_;
  std::condition_variable job_came_;
  std::condition_variable batch_ended_;
  std::deque<Job> jobs_;
  std::atomic<std::size_t> jobs_left_{0};  // jobs_.size()
  bool stopping_ = false;

  PinnedMemory own_memory_;
  PinnedMemory threads_memory_;
  std::optional<Copier> own_;
  std::vector<Copier> copiers_;  // of the threads
  bool threads_asked_for_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace marlinq::cuda
