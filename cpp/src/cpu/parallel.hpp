// The only door to threads. Bodies must not throw; what they write must not depend on the split.
#pragma once

#include <cstdint>

namespace marlinq::cpu {

/// As many threads as the process may run on (its affinity mask).
int default_threads() noexcept;

/// The most that a context may ask for: some times the processors, and within the limits that the
/// threading runtime would end the process over.
int max_threads() noexcept;

namespace detail {
using Body = void (*)(const void* closure, int part, int parts);
void run_parallel(int parts, Body body, const void* closure);
}  // namespace detail

/// Calls f(part, parts) once for each part in [0, parts), at the same time where threads allow.
template <class F>
void parallel_parts(int parts, const F& f) {
  if (parts <= 1) {
    f(0, 1);
    return;
  }
  detail::run_parallel(
      parts,
      [](const void* closure, int part, int all) { (*static_cast<const F*>(closure))(part, all); },
      &f);
}

/// Cuts [0, count) into at most `threads` contiguous ranges of at least `grain` and calls f(begin,
/// end).
template <class F>
void parallel_for(int threads, std::int64_t count, std::int64_t grain, const F& f) {
  const std::int64_t most = count / (grain > 1 ? grain : 1);
  const int parts = static_cast<int>(most < threads ? most : threads);
  const auto body = [&](int part, int all) {
    const std::int64_t begin = count * part / all;
    const std::int64_t end = count * (part + 1) / all;
    if (begin < end) f(begin, end);
  };
  parallel_parts(parts, body);
}

}  // namespace marlinq::cpu
