// Timing of calls that follow each other without a wait, which Python could not make fast enough.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <cstdint>
#include <string_view>
#include <vector>

#include "core/concat.hpp"
#include "core/refuse.hpp"
#include "marlinq/handle.hpp"

namespace marlinq::bindings {

/// Seconds of call(handle, i) for i from `first` on, `count` times, through the handles in turn, from a
/// context without work until its work is done. Throws invalid_argument.
template <class Handle, class Call>
double time_in_turn(std::string_view name, const ContextHandle& context,
                    const std::vector<Handle>& handles, std::int64_t first, std::int64_t count,
                    const Call& call) {
  if (handles.empty() || first < 0 || count < 1) {
    refuse_argument(concat(name, ": ", handles.size(), " handles, first ", first, ", count ", count,
                           ", expected at least 1 handle, first 0 and count 1"));
  }
  const pybind11::gil_scoped_release release;
  context.synchronise();
  const auto start = std::chrono::steady_clock::now();
  for (std::int64_t i = first; i < first + count; ++i) {
    call(handles[static_cast<std::size_t>(i) % handles.size()], i);
  }
  context.synchronise();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace marlinq::bindings
