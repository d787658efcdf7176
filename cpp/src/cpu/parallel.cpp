// OpenMP behind parallel_for. MARLINQ_STD_THREAD builds use std::thread, which ThreadSanitizer
// understands.
#include "cpu/parallel.hpp"

#if defined(MARLINQ_STD_THREAD)
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace marlinq::cpu {

int default_threads() noexcept {
#if defined(MARLINQ_STD_THREAD)
  const unsigned found = std::thread::hardware_concurrency();
  return found > 0 ? static_cast<int>(found) : 1;
#elif defined(_OPENMP)
  return omp_get_num_procs();
#else
  return 1;
#endif
}

int max_threads() noexcept {
  constexpr int kPerProcessor = 8;
  const int most = kPerProcessor * default_threads();
#if defined(_OPENMP) && !defined(MARLINQ_STD_THREAD)
  return omp_get_thread_limit() < most ? omp_get_thread_limit() : most;
#else
  return most;
#endif
}

namespace detail {

void run_parallel(int parts, Body body, const void* closure) {
#if defined(MARLINQ_STD_THREAD)
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<std::size_t>(parts - 1));
  for (int part = 1; part < parts; ++part) helpers.emplace_back(body, closure, part, parts);
  body(closure, 0, parts);
  for (std::thread& helper : helpers) helper.join();
#elif defined(_OPENMP)
// The runtime may grant fewer threads than asked for, so the parts are dealt out over those that
// came.
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int part = 0; part < parts; ++part) body(closure, part, parts);
#else
  for (int part = 0; part < parts; ++part) body(closure, part, parts);
#endif
}

}  // namespace detail
}  // namespace marlinq::cpu
