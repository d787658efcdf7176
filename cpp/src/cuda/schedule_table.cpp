#include "cuda/schedule_table.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <mutex>

#include "core/concat.hpp"
#include "core/refuse.hpp"
#include "cuda/cuda_check.hpp"

namespace marlinq::cuda {

std::string schedule_device(int device) {
  // To ask for properties takes longer than a small layer to load.
  static std::mutex mutex;
  static std::map<int, std::string> known;
  const std::scoped_lock lock(mutex);
  std::string& text = known[device];
  if (text.empty()) {
    cudaDeviceProp properties;
    MARLINQ_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    text = concat(properties.name, ", ", properties.multiProcessorCount, " multiprocessors");
  }
  return text;
}

ScheduleEntry entry_of(int device, const ArchKernels& arch, const WeightView& view,
                       std::int64_t group_size) {
  return {.device = schedule_device(device),
          .kernel = arch.name,
          .bits = view.code_bits,
          .group_size = group_size,
          .n = view.n,
          .k = view.k,
          .first_rows = 1,
          .last_rows = 1,
          .schedule = {}};
}

GemmProblem problem_without_data(const WeightView& view, std::int32_t m) {
  return {.weight = view,
          .x = nullptr,
          .x_type = FloatType::kF16,
          .x_stride = view.k,
          .x_columns = view.k,
          .y = nullptr,
          .y_type = FloatType::kF16,
          .y_stride = view.n,
          .m = m};
}

std::vector<RowsSchedule> schedules_of(std::span<const ScheduleEntry> entries,
                                       const ScheduleEntry& layer, const ArchKernels& arch,
                                       const WeightView& view, const DeviceLimits& limits) {
  std::vector<RowsSchedule> found;
  for (const ScheduleEntry& entry : entries) {
    ScheduleEntry named = layer;
    named.first_rows = entry.first_rows;
    named.last_rows = entry.last_rows;
    named.schedule = entry.schedule;
    if (entry != named) continue;
    constexpr std::int64_t kMostRows = 1 << 20;
    const auto last = static_cast<std::int32_t>(std::min(entry.last_rows, kMostRows));
    const RowsSchedule rows{
        .first_rows = static_cast<std::int32_t>(std::min(entry.first_rows, kMostRows)),
        .last_rows = last,
        .schedule = parse_schedule(entry.schedule)};
    const std::vector<Schedule> known = arch.schedules(problem_without_data(view, last), limits);
    if (std::find(known.begin(), known.end(), rows.schedule) == known.end()) {
      refuse_argument(concat("schedules: '", entry.schedule, "' for ", entry.n, "x", entry.k,
                             " and ", entry.last_rows, " rows: ", arch.name,
                             " has no such schedule; tune this layer again"));
    }
    found.push_back(rows);
  }
  std::sort(found.begin(), found.end(), [](const RowsSchedule& a, const RowsSchedule& b) {
    return a.first_rows < b.first_rows;
  });
  for (std::size_t i = 1; i < found.size(); ++i) {
    if (found[i].first_rows <= found[i - 1].last_rows) {
      refuse_argument(concat("schedules: two for ", layer.n, "x", layer.k, " and ",
                             found[i].first_rows, " rows, expected one"));
    }
  }
  return found;
}

const Schedules& measured_schedules(const ArchKernels& arch) {
  static const std::map<std::string_view, Schedules> all = [] {
    std::map<std::string_view, Schedules> parsed;
    for (const ArchKernels* each : arch_kernels())
      parsed[each->name] = parse_schedules(each->measured);
    return parsed;
  }();
  return all.at(arch.name);
}

GemmPlan plan_rows(const GemmProblem& problem, std::span<const RowsSchedule> schedules,
                   const ArchKernels& arch, const DeviceLimits& limits,
                   BatchInvariance invariance) {
  const auto next = std::find_if(schedules.begin(), schedules.end(), [&](const RowsSchedule& rows) {
    return problem.m <= rows.last_rows;
  });
  if (next != schedules.end() && problem.m >= next->first_rows)
    return arch.plan_as(problem, limits, next->schedule);
  return arch.plan(problem, limits, invariance);
}

}  // namespace marlinq::cuda
