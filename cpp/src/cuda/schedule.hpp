// A schedule: what a plan may choose, apart from how many rows there are.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "cuda/problem.hpp"

namespace marlinq::cuda {

/// A kernel, and how its work is cut: the same for all m of some range. As text it is ScheduleEntry::schedule.
struct Schedule {
  std::string kernels;  // that its kernel is one of: ArchKernels::name
  KernelKind kind = KernelKind::kTile;
  // Which of them.
  std::int32_t features = 0;  // of a tile; kTile
  std::int32_t tokens = 0;
  std::int32_t warps = 0;
  std::int32_t cluster_blocks = 1;
  bool streams_x = false;
  // kTile: the blocks that share each tile of the tail, ...
  std::int32_t share = 1;  // ... 0: all there are share all of it
  bool in_pairs = false;   // ... as TileSchedule::pair_parts says
  // kStrip, where the kernels leave that to the plan: see GemmPlan.
  std::int32_t clusters = 0;
  std::int32_t share_halves = 0;
  std::int32_t stages = 0;
  std::int32_t early_stages = 0;

  bool operator==(const Schedule&) const = default;
};

std::string to_string(const Schedule& schedule);

/// The inverse. Throws invalid_argument.
Schedule parse_schedule(std::string_view text);

/// A schedule of a layer, and for how many rows it is.
struct RowsSchedule {
  std::int32_t first_rows = 1;
  std::int32_t last_rows = 1;
  Schedule schedule;
};

}  // namespace marlinq::cuda
