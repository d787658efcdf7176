#include "cuda/copy_ring.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <utility>

#include "core/integers.hpp"
#include "cuda/cuda_check.hpp"

namespace marlinq::cuda {
namespace {

constexpr std::size_t kSlotsAtOnce = 4;  // of one allocation

// Bytes [begin, end) of what the rows are on the device. Bytes between rows of a batch stay as they
// are.
void gather(std::span<const RawRows> all, std::int64_t begin, std::int64_t end,
            unsigned char* target) {
  for (const RawRows& rows : all) {
    const std::int64_t last = std::min(end, rows.offset + rows.bytes());
    std::int64_t at = std::max(begin, rows.offset);
    while (at < last) {
      const std::int64_t in_rows = at - rows.offset;
      const std::int64_t row = rows.contiguous() ? 0 : in_rows / rows.row_bytes;
      const std::int64_t in_row = in_rows - row * rows.row_bytes;
      const std::int64_t count =
          rows.contiguous() ? last - at : std::min(last - at, rows.row_bytes - in_row);
      std::memcpy(target + (at - begin), rows.data + row * rows.pitch + in_row,
                  static_cast<std::size_t>(count));
      at += count;
    }
  }
}

}  // namespace

CopyRing::~CopyRing() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  job_came_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  const RelaxedCapture relaxed;
  for (const Slot& slot : slots_) (void)cudaEventSynchronize(slot.read.get());
}

void CopyRing::open(Batch& batch) {
  const std::lock_guard lock(batch.opening);
  if (batch.opened) return;
  if (batch.after != nullptr) MARLINQ_CUDA_CHECK(cudaStreamWaitEvent(stream_, batch.after, 0));
  batch.opened = true;
}

void CopyRing::start(Batch& batch) {
  std::vector<Job> jobs;
  for (std::size_t first = 0; first < batch.rows.size();) {
    // What follows one another on the device is one range, but for the gaps of alignment.
    constexpr std::int64_t kGap = 256;
    std::size_t last = first;
    std::int64_t end = batch.rows[first].offset + batch.rows[first].bytes();
    while (last + 1 < batch.rows.size() && batch.rows[last + 1].offset - end < kGap) {
      ++last;
      end = batch.rows[last].offset + batch.rows[last].bytes();
    }
    const std::int64_t begin = batch.rows[first].offset;
    const std::int64_t count = ceil_div(end - begin, sizes_.slot_bytes);
    const std::int64_t step = round_up(ceil_div(end - begin, count), kGap);
    for (std::int64_t at = begin; at < end; at += step) {
      jobs.push_back({.batch = &batch, .begin = at, .end = std::min(end, at + step)});
    }
    first = last + 1;
  }
  if (threads_.empty()) start_threads();
  {
    const std::lock_guard lock(mutex_);
    jobs_.insert(jobs_.end(), jobs.begin(), jobs.end());
    batch.pending += static_cast<std::int64_t>(jobs.size());
  }
  job_came_.notify_all();
}

void CopyRing::wait(Batch& batch) {
  std::unique_lock lock(mutex_);
  while (batch.pending > 0) {
    if (jobs_.empty()) {
      batch_ended_.wait(lock);
      continue;
    }
    const Job job = jobs_.front();
    jobs_.pop_front();
    lock.unlock();
    run(job);
    lock.lock();
  }
  if (batch.error) std::rethrow_exception(batch.error);
}

void CopyRing::cancel(Batch& batch) noexcept {
  std::unique_lock lock(mutex_);
  batch.pending -= static_cast<std::int64_t>(
      std::erase_if(jobs_, [&batch](const Job& job) { return job.batch == &batch; }));
  batch_ended_.wait(lock, [&batch] { return batch.pending == 0; });
}

void CopyRing::put(void* target, const void* source, std::int64_t bytes, cudaStream_t stream) {
  for (std::int64_t at = 0; at < bytes; at += sizes_.slot_bytes) {
    const std::int64_t count = std::min(sizes_.slot_bytes, bytes - at);
    Slot& slot = take_slot();
    std::memcpy(slot.memory, static_cast<const unsigned char*>(source) + at,
                static_cast<std::size_t>(count));
    send(slot, static_cast<unsigned char*>(target) + at, count, stream);
  }
}

void CopyRing::send(Slot& slot, unsigned char* target, std::int64_t bytes, cudaStream_t stream) {
  cudaError_t status = cudaMemcpyAsync(target, slot.memory, static_cast<std::size_t>(bytes),
                                       cudaMemcpyHostToDevice, stream);
  if (status == cudaSuccess) {
    status = cudaEventRecord(slot.read.get(), stream);
    // Nothing else tells when the slot has been read.
    if (status != cudaSuccess) (void)cudaStreamSynchronize(stream);
  }
  give_back(slot);
  MARLINQ_CUDA_CHECK(status);
}

void CopyRing::start_threads() {
  const unsigned count = std::min(sizes_.threads, std::thread::hardware_concurrency() / 2);
  threads_.reserve(count);
  try {
    while (threads_.size() < count) threads_.emplace_back([this] { work(); });
  } catch (const std::system_error&) {
    // Those that there are do, or the caller's alone.
  }
}

void CopyRing::work() noexcept {
  if (cudaSetDevice(device_) != cudaSuccess) return;
  const RelaxedCapture relaxed;
  std::unique_lock lock(mutex_);
  for (;;) {
    job_came_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
    if (stopping_) return;
    const Job job = jobs_.front();
    jobs_.pop_front();
    lock.unlock();
    run(job);
    lock.lock();
  }
}

void CopyRing::run(const Job& job) noexcept {
  std::exception_ptr error;
  try {
    copy(job);
  } catch (...) {
    error = std::current_exception();
  }
  const std::lock_guard lock(mutex_);
  if (error && !job.batch->error) job.batch->error = std::move(error);
  if (--job.batch->pending == 0) batch_ended_.notify_all();
}

void CopyRing::copy(const Job& job) {
  Slot& slot = take_slot();
  gather(job.batch->rows, job.begin, job.end, slot.memory);
  try {
    open(*job.batch);
  } catch (...) {
    give_back(slot);
    throw;
  }
  send(slot, job.batch->target + job.begin, job.end - job.begin, stream_);
}

CopyRing::Slot& CopyRing::take_slot() {
  std::unique_lock lock(mutex_);
  for (;;) {
    if (!free_.empty()) {
      Slot* slot = free_.front();
      const cudaError_t status = cudaEventQuery(slot->read.get());
      if (status != cudaErrorNotReady) MARLINQ_CUDA_CHECK(status);
      const bool ready = status == cudaSuccess;
      if (!ready) (void)cudaGetLastError();  // not ready is no error
      if (ready || !grow()) {
        free_.pop_front();
        lock.unlock();
        const cudaError_t waited = ready ? status : cudaEventSynchronize(slot->read.get());
        if (waited != cudaSuccess) give_back(*slot);
        MARLINQ_CUDA_CHECK(waited);
        return *slot;
      }
    }
    if (free_.empty() && !grow()) slot_came_.wait(lock);
  }
}

void CopyRing::give_back(Slot& slot) noexcept {
  const std::lock_guard lock(mutex_);
  free_.push_back(&slot);
  slot_came_.notify_one();
}

bool CopyRing::grow() {
  if (limited_ || slots_.size() + kSlotsAtOnce > sizes_.slots) return false;
  void* memory = nullptr;
  const std::size_t bytes = kSlotsAtOnce * static_cast<std::size_t>(sizes_.slot_bytes);
  const cudaError_t status = cudaHostAlloc(&memory, bytes, cudaHostAllocDefault);
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    limited_ = !slots_.empty();
    if (limited_) return false;
    throw Error(ErrorCode::kOutOfMemory,
                concat("cannot allocate ", bytes, " bytes of pinned host memory"));
  }
  MARLINQ_CUDA_CHECK(status);
  memory_.emplace_back(static_cast<unsigned char*>(memory));
  for (std::size_t i = 0; i < kSlotsAtOnce; ++i) {
    slots_.emplace_back().memory =
        memory_.back().get() + static_cast<std::int64_t>(i) * sizes_.slot_bytes;
    free_.push_front(&slots_.back());
  }
  return true;
}

}  // namespace marlinq::cuda
