// Measured schedules: which kernel of a GPU runs a layer, and how it is cut, where that is known better than by
// the backend's estimate. `marlinq tune` measures them.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "marlinq/export.hpp"

namespace marlinq {

/// How layers of one shape and format run on one kind of GPU, with first_rows to last_rows rows of x.
struct ScheduleEntry {
  std::string device;  // name and multiprocessors, as a tuner tells them
  std::string kernel;  // that layers are loaded for: LoadOptions::kernel
  int bits = 4;
  std::int64_t group_size = 128;
  std::int64_t n = 0;
  std::int64_t k = 0;
  std::int64_t first_rows = 1;
  std::int64_t last_rows = 1;
  std::string schedule;  // in the words of the backend

  bool operator==(const ScheduleEntry&) const = default;
};

using Schedules = std::vector<ScheduleEntry>;

/// A line for each entry: device | kernel | w4 g128 | NxK | first-last | schedule. Lines that are empty or begin with # say
/// nothing. Throws invalid_argument, which names the line.
MARLINQ_API Schedules parse_schedules(std::string_view text);

/// The inverse of parse_schedules.
MARLINQ_API std::string to_text(std::span<const ScheduleEntry> schedules);

/// What a tuner measured for a layer: the quickest schedule, its time, and that of the backend's own choice. Where that is the
/// quickest and has no words of its own, there is no schedule.
struct TunedSchedule {
  ScheduleEntry entry;
  double us = 0;
  double estimated_us = 0;
};

}  // namespace marlinq
