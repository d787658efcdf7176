// Work of a device that was begun by one thread and is waited for by whoever needs its result.
#pragma once

#include <memory>

namespace marlinq::cuda {

/// Shared by any number of threads. Movable; the default has nothing to wait for.
class Completion {
 public:
  Completion() noexcept;
  /// Everything that is on `stream` (a cudaStream_t of the current device) now.
  static Completion of(void* stream);
  Completion(Completion&&) noexcept;
  Completion& operator=(Completion&&) noexcept;
  /// Waits, so that memory that the work uses may be freed afterwards.
  ~Completion();

  /// Orders what is appended to `stream` from now on after the work. Once the work is known to have
  /// ended this is one load of a flag. A stream that is being captured must not depend on work
  /// outside of its graph: there, unfinished work is waited for on the host. Throws device.
  void precede(void* stream) const;

  /// Waits on the host. Throws device.
  void wait() const;

 private:
  struct State;
  explicit Completion(std::unique_ptr<State> state) noexcept;

  std::unique_ptr<State> state_;
};

}  // namespace marlinq::cuda
