#include "cuda/copy_ring.hpp"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <span>
#include <system_error>
#include <thread>
#include <utility>

#include "core/concat.hpp"
#include "core/integers.hpp"
#include "cuda/cuda_check.hpp"

namespace marlinq::cuda {
namespace {

// What follows one another on the device is one range, but for the gaps of alignment.
constexpr std::int64_t kGap = 256;

void pause() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Waits until done(), but not for long. Whoever sleeps wakes up 50 to 100 us late, which is longer
// than it takes from one piece of a load to the next.
template <class Done>
void wait_awake(const Done& done) {
  constexpr auto kLongest = std::chrono::microseconds(200);
  constexpr int kLooks = 32;  // about a microsecond
  const auto end = std::chrono::steady_clock::now() + kLongest;
  while (std::chrono::steady_clock::now() < end) {
    for (int look = 0; look < kLooks; ++look) {
      if (done()) return;
      pause();
    }
    std::this_thread::yield();  // there may be more threads than cores
  }
}

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
  if (own_) own_->wait();
  for (const Copier& copier : copiers_) copier.wait();
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
    std::size_t last = first;
    std::int64_t end = batch.rows[first].offset + batch.rows[first].bytes();
    while (last + 1 < batch.rows.size() && batch.rows[last + 1].offset - end < kGap) {
      ++last;
      end = batch.rows[last].offset + batch.rows[last].bytes();
    }
    const std::int64_t begin = batch.rows[first].offset;
    const std::int64_t step = job_bytes(end - begin);
    for (std::int64_t at = begin; at < end; at += step) {
      jobs.push_back({.batch = &batch, .begin = at, .end = std::min(end, at + step)});
    }
    first = last + 1;
  }
  // A couple of jobs are done before the threads' memory is there.
  if (jobs.size() > std::min<std::size_t>(2, sizes_.threads)) start_threads();
  {
    const std::lock_guard lock(mutex_);
    jobs_.insert(jobs_.end(), jobs.begin(), jobs.end());
    jobs_left_ = jobs_.size();
    batch.pending += static_cast<std::int64_t>(jobs.size());
  }
  job_came_.notify_all();
}

// As even as can be, and at least one for each thread, so that all of them help with a small range.
// Not below 256 KB: to ask for a copy would cost more than another thread gains.
std::int64_t CopyRing::job_bytes(std::int64_t bytes) const noexcept {
  constexpr std::int64_t kLeast = std::int64_t{256} << 10;
  const std::int64_t copiers = std::int64_t{sizes_.threads} + 1;
  const std::int64_t jobs =
      std::max(ceil_div(bytes, sizes_.slot_bytes), std::min(copiers, bytes / kLeast));
  return round_up(ceil_div(bytes, jobs), kGap);
}

void CopyRing::wait(Batch& batch) {
  while (batch.pending > 0) {
    Copier& copier = own();
    const std::optional<Job> job = take_job();
    if (!job) break;
    run(*job, copier);
  }
  const auto ended = [&batch] { return batch.pending == 0; };
  wait_awake(ended);
  std::unique_lock lock(mutex_);
  batch_ended_.wait(lock, ended);
  if (batch.error) std::rethrow_exception(batch.error);
}

void CopyRing::cancel(Batch& batch) noexcept {
  std::unique_lock lock(mutex_);
  batch.pending -= static_cast<std::int64_t>(
      std::erase_if(jobs_, [&batch](const Job& job) { return job.batch == &batch; }));
  jobs_left_ = jobs_.size();
  batch_ended_.wait(lock, [&batch] { return batch.pending == 0; });
}

void CopyRing::put(void* target, const void* source, std::int64_t bytes, std::int64_t count,
                   std::int64_t pitch, cudaStream_t stream) {
  const auto* from = static_cast<const unsigned char*>(source);
  const std::int64_t at_once = std::max<std::int64_t>(1, sizes_.slot_bytes / bytes);  // places
  for (std::int64_t place = 0; place < count; place += at_once) {
    unsigned char* const to = static_cast<unsigned char*>(target) + place * pitch;
    const std::int64_t places = std::min(at_once, count - place);
    for (std::int64_t at = 0; at < bytes; at += sizes_.slot_bytes) {
      const std::int64_t size = std::min(sizes_.slot_bytes, bytes - at);
      Slot& slot = own().next_slot();
      for (std::int64_t i = 0; i < places; ++i) {
        std::memcpy(slot.memory + i * size, from + at, static_cast<std::size_t>(size));
      }
      send(slot, to + at, size, stream, places, pitch);
    }
  }
}

void CopyRing::send(Slot& slot, unsigned char* target, std::int64_t bytes, cudaStream_t stream,
                    std::int64_t rows, std::int64_t pitch) {
  const auto size = static_cast<std::size_t>(bytes);
  cudaError_t status =
      rows == 1
          ? cudaMemcpyAsync(target, slot.memory, size, cudaMemcpyHostToDevice, stream)
          : cudaMemcpy2DAsync(target, static_cast<std::size_t>(pitch), slot.memory, size, size,
                              static_cast<std::size_t>(rows), cudaMemcpyHostToDevice, stream);
  if (status == cudaSuccess) {
    status = cudaEventRecord(slot.read.get(), stream);
    // Nothing else tells when the slot has been read.
    if (status != cudaSuccess) (void)cudaStreamSynchronize(stream);
  }
  MARLINQ_CUDA_CHECK(status);
}

CopyRing::PinnedMemory CopyRing::pin(std::size_t copiers) const {
  void* memory = nullptr;
  const cudaError_t status =
      cudaHostAlloc(&memory, static_cast<std::size_t>(bytes_of(copiers)), cudaHostAllocDefault);
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    return nullptr;
  }
  MARLINQ_CUDA_CHECK(status);
  return PinnedMemory(static_cast<unsigned char*>(memory));
}

CopyRing::Copier& CopyRing::own() {
  if (own_) return *own_;
  if (own_memory_ == nullptr) own_memory_ = pin(1);
  if (own_memory_ == nullptr) {
    throw Error(ErrorCode::kOutOfMemory,
                concat("cannot allocate ", bytes_of(1), " bytes of pinned host memory"));
  }
  return own_.emplace(own_memory_.get(), sizes_.slot_bytes);
}

void CopyRing::start_threads() {
  if (threads_asked_for_) return;
  (void)own();  // first: nothing works without
  std::size_t count = sizes_.threads;
  while (count > 0 && (threads_memory_ = pin(count)) == nullptr) count /= 2;
  copiers_.clear();
  copiers_.reserve(count);
  while (copiers_.size() < count) {
    copiers_.emplace_back(threads_memory_.get() + bytes_of(copiers_.size()), sizes_.slot_bytes);
  }
  threads_asked_for_ = true;
  threads_.reserve(count);
  try {
    for (Copier& copier : copiers_) threads_.emplace_back([this, &copier] { work(copier); });
  } catch (const std::system_error&) {
    // Those that there are do, or the caller's alone.
  }
}

void CopyRing::work(Copier& copier) noexcept {
  if (cudaSetDevice(device_) != cudaSuccess) return;
  const RelaxedCapture relaxed;
  for (;;) {
    if (const std::optional<Job> job = take_job()) {
      run(*job, copier);
      continue;
    }
    wait_awake([this] { return jobs_left_ > 0; });
    std::unique_lock lock(mutex_);
    job_came_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
    if (stopping_) return;
  }
}

std::optional<CopyRing::Job> CopyRing::take_job() {
  const std::lock_guard lock(mutex_);
  if (jobs_.empty()) return std::nullopt;
  const Job job = jobs_.front();
  jobs_.pop_front();
  jobs_left_ = jobs_.size();
  return job;
}

void CopyRing::run(const Job& job, Copier& copier) noexcept {
  std::exception_ptr error;
  try {
    copy(job, copier);
  } catch (...) {
    error = std::current_exception();
  }
  const std::lock_guard lock(mutex_);
  if (error && !job.batch->error) job.batch->error = std::move(error);
  if (--job.batch->pending == 0) batch_ended_.notify_all();
}

void CopyRing::copy(const Job& job, Copier& copier) {
  Slot& slot = copier.next_slot();
  gather(job.batch->rows, job.begin, job.end, slot.memory);
  open(*job.batch);
  send(slot, job.batch->target + job.begin, job.end - job.begin, stream_);
}

CopyRing::Copier::Copier(unsigned char* memory, std::int64_t slot_bytes) {
  for (Slot& slot : slots_) {
    slot.memory = memory;
    memory += slot_bytes;
  }
}

CopyRing::Slot& CopyRing::Copier::next_slot() {
  Slot& slot = slots_[next_];
  MARLINQ_CUDA_CHECK(cudaEventSynchronize(slot.read.get()));
  next_ = (next_ + 1) % slots_.size();
  return slot;
}

void CopyRing::Copier::wait() const noexcept {
  for (const Slot& slot : slots_) (void)cudaEventSynchronize(slot.read.get());
}

}  // namespace marlinq::cuda
