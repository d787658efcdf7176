// Measured schedules and layers: which entries a layer takes, and the plan of its rows.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "cuda/arch_table.hpp"
#include "cuda/device_weight.hpp"
#include "cuda/problem.hpp"
#include "marlinq/load_options.hpp"
#include "marlinq/schedules.hpp"

namespace marlinq::cuda {

/// ScheduleEntry::device.
std::string schedule_device(int device);

/// What an entry for these modules says of them; rows and schedule are left open.
ScheduleEntry entry_of(int device, const ArchKernels& arch, const WeightView& view,
                       std::int64_t group_size);

/// A product of m rows with the weight, whose x and y lie nowhere.
GemmProblem problem_without_data(const WeightView& view, std::int32_t m);

/// The schedules among `entries` for `layer`, whose weight is `view`, without those that only a symmetric one with
/// float16 scales and groups of one length would take. Throws invalid_argument for one that the kernels do not have, or where two are for the same rows.
std::vector<RowsSchedule> schedules_of(std::span<const ScheduleEntry> entries,
                                       const ScheduleEntry& layer, const ArchKernels& arch,
                                       const WeightView& view, const DeviceLimits& limits);

/// Those that come with the library.
const Schedules& measured_schedules(const ArchKernels& arch);

/// The same of those that come with the library, kept for the next layer of the kind.
std::vector<RowsSchedule> measured_schedules_of(const ScheduleEntry& layer, const ArchKernels& arch,
                                                const WeightView& view, const DeviceLimits& limits);

/// As `schedules` say for so many rows, else as the architecture plans.
GemmPlan plan_rows(const GemmProblem& problem, std::span<const RowsSchedule> schedules,
                   const ArchKernels& arch, const DeviceLimits& limits, BatchInvariance invariance);

}  // namespace marlinq::cuda
