#include "cuda/schedule_table.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <map>
#include <mutex>
#include <string_view>
#include <tuple>

#include "core/concat.hpp"
#include "core/integers.hpp"
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

namespace {

// What such layers most often are: symmetric, with float16 scales and groups of one length. Others hold more beside the codes, and may
// have no room for what was measured with that; or other kernels.
WeightView usual_layer(const WeightView& view, std::int64_t group_size) {
  constexpr std::int32_t kRecordBytes = 32;
  WeightView usual = view;
  usual.has_zeros = false;
  usual.scale_type = FloatType::kF16;
  usual.small_scales = true;
  usual.scales_divide = true;
  usual.record_bytes = kRecordBytes;
  const std::int64_t steps = group_size / 16;
  if (view.step_shift < 0 && group_size % 16 == 0 && steps > 0 &&
      std::has_single_bit(static_cast<std::uint64_t>(steps))) {
    usual.step_shift = std::countr_zero(static_cast<std::uint64_t>(steps));
    usual.chunk_shift = std::max(usual.step_shift - 2, -1);
    usual.num_groups = static_cast<std::int32_t>(ceil_div(view.k, group_size));
    usual.groups_per_chunk = static_cast<std::int32_t>(std::max<std::int64_t>(4 / steps, 1));
  }
  return usual;
}

}  // namespace

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
    const auto is_one_of = [&](const WeightView& weight) {
      const std::vector<Schedule> known =
          arch.schedules(problem_without_data(weight, last), limits);
      return std::find(known.begin(), known.end(), rows.schedule) != known.end();
    };
    if (is_one_of(view)) {
      found.push_back(rows);
    } else if (!is_one_of(usual_layer(view, entry.group_size))) {
      refuse_argument(concat("schedules: '", entry.schedule, "' for ", entry.n, "x", entry.k,
                             " and ", entry.last_rows, " rows: ", arch.name,
                             " has no such schedule; tune this layer again"));
    }
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

std::vector<RowsSchedule> measured_schedules_of(const ScheduleEntry& layer, const ArchKernels& arch,
                                                const WeightView& view,
                                                const DeviceLimits& limits) {
  // Models have many layers of few kinds, and to look for schedules takes as long as a small layer's copies.
  using Kind = std::tuple<std::string, std::string_view, std::int32_t, std::int64_t, std::int64_t,
                          std::int64_t, std::int32_t, std::int32_t, FloatType, bool, bool, bool>;
  static std::mutex mutex;
  static std::map<Kind, std::vector<RowsSchedule>> known;
  const Kind kind{layer.device,    arch.name,      layer.bits,        layer.group_size,
                  layer.n,         layer.k,        view.chunks,       view.step_shift,
                  view.scale_type, view.has_zeros, view.small_scales, view.scales_divide};
  const std::scoped_lock lock(mutex);
  const auto place = known.find(kind);
  if (place != known.end()) return place->second;
  return known[kind] = schedules_of(measured_schedules(arch), layer, arch, view, limits);
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
