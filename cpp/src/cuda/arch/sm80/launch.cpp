// Plans of the sm_80 kernels: pure host code, and the table that a plan selects from.
#include "cuda/arch/sm80/launch.hpp"

#include <algorithm>
#include <array>
#include <climits>
#include <cstdint>
#include <limits>

#include "core/concat.hpp"
#include "core/integers.hpp"
#include "cuda/arch/sm80/experts.hpp"
#include "cuda/arch/sm80/layout.hpp"
#include "cuda/arch/sm80/load.hpp"
#include "cuda/arch/sm80/plan.hpp"
#include "marlinq/error.hpp"

namespace marlinq::cuda::sm80 {

extern const ArchKernels kKernels;
extern const std::array<Instance, kInstanceCount> kInstances_fp16_w4;
extern const std::array<Instance, kInstanceCount> kInstances_fp16_w8;
extern const std::array<Instance, kInstanceCount> kInstances_bf16_w4;
extern const std::array<Instance, kInstanceCount> kInstances_bf16_w8;

std::span<const Instance> instances(FloatType type, std::int32_t code_bits) {
  if (type == FloatType::kF16) return code_bits == 4 ? kInstances_fp16_w4 : kInstances_fp16_w8;
  return code_bits == 4 ? kInstances_bf16_w4 : kInstances_bf16_w8;
}

GemmPlan strip_plan(const GemmProblem& problem, std::int32_t instance, std::int32_t multiprocessors,
                    std::int32_t warps) {
  const WeightView& w = problem.weight;
  const Instance& kernel =
      instances(problem.x_type, w.code_bits)[static_cast<std::size_t>(instance)];
  const std::int32_t strips = strip_count(w);
  // As few strips for the busiest block as can be, then as few blocks as that takes.
  const auto most = static_cast<std::int32_t>(ceil_div(strips, multiprocessors));
  const auto blocks = static_cast<std::int32_t>(ceil_div(strips, most));
  const EvenShare share(strips, blocks);
  const StripMemory memory = strip_memory(w, share, kernel.slice_bytes);
  const std::int64_t groups = strip_groups_at_most(share);
  const std::int64_t rings =
      std::int64_t{warps} * kernel.stages * (memory.stage_bytes + memory.record_bytes);
  const std::int64_t slots = (groups - 1) * kernel.sum_bytes;
  const std::int64_t contributors = groups * 4;
  return {.kind = KernelKind::kStrip,
          .instance = instance,
          .blocks = blocks,
          .warps = warps,
          .shared_bytes = static_cast<std::int32_t>(
              std::min<std::int64_t>(rings + slots + contributors, INT32_MAX)),
          .tokens = kernel.tokens,
          .schedule = {},
          .dependent_launch = false};
}

GemmPlan tile_plan(const GemmProblem& problem, std::int32_t instance, std::int32_t blocks,
                   std::int32_t tail_blocks) {
  const WeightView& w = problem.weight;
  const Instance& kernel =
      instances(problem.x_type, w.code_bits)[static_cast<std::size_t>(instance)];
  const std::int64_t tiles = ceil_div(w.n, kernel.features) * ceil_div(problem.m, kernel.tokens);
  const std::int64_t stage =
      std::int64_t{kernel.row_warps} * slice_bytes(w, kernel.slice_bytes, kernel.features);
  const std::int64_t ring = kernel.stages * stage;
  const auto waves = static_cast<std::int32_t>(tiles / blocks);
  const auto left = static_cast<std::int32_t>(tiles % blocks);
  // Tiles that are walked through together should share what they read: a band of token tiles about
  // as wide as the features of a wave are many.
  constexpr std::int32_t kTokenBand = 8;
  return {.kind = KernelKind::kTile,
          .instance = instance,
          .blocks = waves > 0 ? blocks : tail_blocks,
          .warps = kernel.warps,
          .shared_bytes = static_cast<std::int32_t>(std::min<std::int64_t>(
              kernel.sums_beside_ring ? ring + kernel.sum_bytes
                                      : std::max<std::int64_t>(ring, kernel.sum_bytes),
              INT32_MAX)),
          .tokens = INT32_MAX,
          .schedule = {.whole_tiles = waves,
                       .tail_tiles = left,
                       .tail_blocks = left > 0 ? tail_blocks : 0,
                       .token_band = kTokenBand},
          .dependent_launch = false};
}

namespace {

constexpr std::int32_t kPromoting = 0;  // the strip kernel that needs no quotients of scales

// Few tokens: as many warps as have some items each.
GemmPlan plan_strips(const GemmProblem& problem, std::int32_t instance,
                     const DeviceLimits& limits) {
  const WeightView& w = problem.weight;
  const Instance& kernel =
      instances(problem.x_type, w.code_bits)[static_cast<std::size_t>(instance)];
  const std::int64_t block_strips = ceil_div(strip_count(w), limits.multiprocessors);
  const std::int64_t items = ceil_div(block_strips, Layout::kBlockStrips) * w.chunks;
  std::int32_t warps = kernel.warps;
  if (kernel.tokens == 8 && items < 3 * warps) warps = items >= 8 ? 8 : 4;
  GemmPlan best = strip_plan(problem, instance, limits.multiprocessors, warps);
  while (warps > 1 && best.shared_bytes > limits.shared_bytes) {
    best = strip_plan(problem, instance, limits.multiprocessors, --warps);
  }
  return best;
}

std::int32_t blocks_together(const Instance& kernel, const GemmPlan& plan,
                             const DeviceLimits& limits) {
  const std::int32_t fit =
      limits.multiprocessor_shared_bytes / (plan.shared_bytes + kReservedShared);
  return std::clamp(fit, 1, kernel.blocks_together);
}

double tile_cost(const Instance& kernel, const GemmPlan& plan, std::int32_t chunks,
                 std::int32_t together, std::int32_t multiprocessors) {
  const TileCost& cost = kernel.cost;
  const TileSchedule& schedule = plan.schedule;
  const auto steps = static_cast<double>(ceil_div(chunks, kernel.row_warps));
  double time = cost.start + schedule.whole_tiles * (steps * cost.step[together - 1] + cost.tile);
  if (schedule.tail_tiles == 0) return time;
  const auto run = static_cast<double>(
      ceil_div(ceil_div(std::int64_t{schedule.tail_tiles} * chunks, schedule.tail_blocks),
               kernel.row_warps));
  const auto there =
      std::min<std::int64_t>(together, ceil_div(schedule.tail_blocks, multiprocessors));
  time += run * cost.step[there - 1];
  if (schedule.tail_blocks > schedule.tail_tiles) {
    const auto parts = static_cast<double>(ceil_div(schedule.tail_blocks, schedule.tail_tiles) - 1);
    time +=
        cost.cut + parts * cost.part + cost.block * (schedule.tail_blocks - schedule.tail_tiles);
    if (schedule.tail_blocks % schedule.tail_tiles != 0) time += cost.uneven;
  }
  return time;
}

/// How many tiles of a kernel are left after whole waves, and how many blocks may share them.
struct Tail {
  std::int32_t together;  // blocks on a multiprocessor; 0: the kernel does not fit
  std::int32_t blocks;
  std::int32_t left;
  std::int64_t most;
};

Tail tail_of(const GemmProblem& problem, std::int32_t instance, const DeviceLimits& limits) {
  const Instance& kernel =
      instances(problem.x_type, problem.weight.code_bits)[static_cast<std::size_t>(instance)];
  const GemmPlan plan = tile_plan(problem, instance, 1, 0);
  if (plan.shared_bytes > limits.shared_bytes) return {};
  const std::int32_t together = blocks_together(kernel, plan, limits);
  const std::int32_t blocks = together * limits.multiprocessors;
  const std::int32_t left = tile_plan(problem, instance, blocks, 0).schedule.tail_tiles;
  // A run of less than this is not worth handing over.
  const std::int64_t least_chunks = 2 * kernel.row_warps;
  return {
      together, blocks, left,
      std::min<std::int64_t>(blocks, std::int64_t{left} * problem.weight.chunks / least_chunks)};
}

// The cheapest plan of a tile kernel among those that share the last tiles among few or all blocks.
void consider_tiles(const GemmProblem& problem, std::int32_t instance, const DeviceLimits& limits,
                    bool may_cut, GemmPlan& best, double& least) {
  const Tail tail = tail_of(problem, instance, limits);
  if (tail.together == 0) return;
  const Instance& kernel =
      instances(problem.x_type, problem.weight.code_bits)[static_cast<std::size_t>(instance)];
  each_share(tail.left, tail.most, [&](std::int32_t share, std::int32_t blocks) {
    if (share != 1 && !may_cut) return;
    const GemmPlan plan = tile_plan(problem, instance, tail.blocks, blocks);
    const double cost =
        tile_cost(kernel, plan, problem.weight.chunks, tail.together, limits.multiprocessors);
    if (cost < least) {
      least = cost;
      best = plan;
    }
  });
}

// Kernels that give a row of x the same sums whatever m is: of one family, which divides K in one
// way, and without cuts. That with most row warps is quickest for few tokens.
bool is_invariant_family(const Instance& kernel, std::int32_t row_warps) {
  return kernel.kind == KernelKind::kTile && kernel.row_warps == row_warps;
}

std::int32_t invariant_row_warps(const GemmProblem& problem, const DeviceLimits& limits) {
  constexpr std::int32_t kMany = 4;
  const std::span<const Instance> all = instances(problem.x_type, problem.weight.code_bits);
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (is_invariant_family(all[i], kMany) &&
        tile_plan(problem, static_cast<std::int32_t>(i), 1, 0).shared_bytes > limits.shared_bytes) {
      return 1;
    }
  }
  return kMany;
}

}  // namespace

GemmPlan plan(const GemmProblem& problem, const DeviceLimits& limits, BatchInvariance invariance) {
  const std::span<const Instance> all = instances(problem.x_type, problem.weight.code_bits);
  const bool invariant = invariance == BatchInvariance::kRequired;
  constexpr std::int32_t kStrips = 2;
  GemmPlan best;
  bool found = false;
  if (!problem.weight.scales_divide) {
    best = plan_strips(problem, kPromoting, limits);
    found = true;
  }
  for (std::int32_t i = 0; i < kStrips && !found && !invariant; ++i) {
    if (problem.m > all[static_cast<std::size_t>(i)].tokens) continue;
    best = plan_strips(problem, i, limits);
    found = best.shared_bytes <= limits.shared_bytes;
  }
  if (!found) {
    const std::int32_t row_warps = invariant ? invariant_row_warps(problem, limits) : 0;
    double least = std::numeric_limits<double>::infinity();
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (all[i].kind != KernelKind::kTile) continue;
      if (invariant && !is_invariant_family(all[i], row_warps)) continue;
      consider_tiles(problem, static_cast<std::int32_t>(i), limits, !invariant, best, least);
    }
    found = least < std::numeric_limits<double>::infinity();
  }
  if (!found || best.shared_bytes > limits.shared_bytes) {
    throw Error(ErrorCode::kInternal,
                concat("sm80: no kernel for ", problem.m, " tokens x ", problem.weight.n,
                       " features fits ", limits.shared_bytes, " bytes of shared memory"));
  }
  best.dependent_launch = limits.capability >= 90;
  return best;
}

std::vector<Schedule> schedules(const GemmProblem& problem, const DeviceLimits& limits) {
  std::vector<Schedule> all;
  const std::span<const Instance> kernels = instances(problem.x_type, problem.weight.code_bits);
  for (std::size_t i = 0; i < kernels.size(); ++i) {
    const Instance& kernel = kernels[i];
    const auto index = static_cast<std::int32_t>(i);
    if (!problem.weight.scales_divide && index != kPromoting) continue;
    Schedule schedule{.kernels = kKernels.name,
                      .kind = kernel.kind,
                      .features = kernel.features,
                      .tokens = kernel.tokens,
                      .warps = kernel.warps};
    if (kernel.kind == KernelKind::kStrip) {
      if (problem.m > kernel.tokens || problem.m <= kernel.tokens - 8) continue;
      for (schedule.warps = 4; schedule.warps <= kernel.warps; schedule.warps += 4) {
        const GemmPlan plan = strip_plan(problem, index, limits.multiprocessors, schedule.warps);
        if (plan.shared_bytes <= limits.shared_bytes) all.push_back(schedule);
      }
      continue;
    }
    const Tail tail = tail_of(problem, index, limits);
    constexpr std::int32_t kFewTokens = 32;
    if (tail.together == 0 || problem.m <= kernel.tokens / 8 ||
        (kernel.tokens == kFewTokens && problem.m > 8 * kFewTokens))
      continue;
    each_share(tail.left, tail.most, [&](std::int32_t share, std::int32_t) {
      schedule.share = share;
      all.push_back(schedule);
    });
  }
  return all;
}

GemmPlan plan_as(const GemmProblem& problem, const DeviceLimits& limits, const Schedule& schedule) {
  const std::span<const Instance> kernels = instances(problem.x_type, problem.weight.code_bits);
  const bool strips = schedule.kind == KernelKind::kStrip;
  const auto found = std::find_if(kernels.begin(), kernels.end(), [&](const Instance& kernel) {
    return kernel.kind == schedule.kind && kernel.tokens == schedule.tokens &&
           (strips || (kernel.features == schedule.features && kernel.warps == schedule.warps));
  });
  GemmPlan plan;
  if (found == kernels.end()) {
    plan.shared_bytes = INT32_MAX;
    return plan;
  }
  const auto index = static_cast<std::int32_t>(found - kernels.begin());
  if (strips) {
    plan = strip_plan(problem, index, limits.multiprocessors, schedule.warps);
  } else {
    const Tail tail = tail_of(problem, index, limits);
    plan = tile_plan(problem, index, tail.blocks,
                     blocks_of_share(schedule.share, tail.left, tail.most));
  }
  plan.dependent_launch = limits.capability >= 90;
  return plan;
}

void launch(const GemmProblem& problem, const GemmPlan& plan, const SplitScratch& scratch,
            void* stream) {
  const Instance& kernel =
      instances(problem.x_type, problem.weight.code_bits)[static_cast<std::size_t>(plan.instance)];
  launch_slices(kernel, problem, plan, scratch, stream);
}

namespace {

void scratch_need(const DeviceLimits& limits, std::int64_t& partial_floats, std::int32_t& flags) {
  // A block leaves one part at most, and has one flag.
  partial_floats = 0;
  flags = 0;
  for (const Instance& instance : instances(FloatType::kF16, 4)) {
    if (instance.kind != KernelKind::kTile) continue;
    const std::int32_t blocks = limits.multiprocessors * instance.blocks_together;
    partial_floats = std::max<std::int64_t>(
        partial_floats, std::int64_t{blocks} * instance.tokens * instance.features);
    flags = std::max(flags, blocks);
  }
  for (const ExpertInstance& instance : expert_instances(FloatType::kF16, 4)) {
    const std::int32_t blocks = limits.multiprocessors * instance.blocks_together;
    partial_floats = std::max<std::int64_t>(
        partial_floats, std::int64_t{blocks} * instance.tokens * instance.features);
    flags = std::max(flags, blocks);
  }
}

}  // namespace

constinit const ArchKernels kKernels = {.name = "sm80",
                                        .priority = 80,
                                        .min_capability = 80,
                                        .max_capability = INT_MAX,
                                        .requirement = "compute capability 8.0",
                                        .pack = load,
                                        .plan = plan,
                                        .schedules = schedules,
                                        .plan_as = plan_as,
                                        .measured = {},
                                        .scratch_need = scratch_need,
                                        .launch = launch,
                                        .plan_experts = plan_experts,
                                        .launch_experts = launch_experts,
                                        .most_dispatches = kMostDispatches,
                                        .tile_rows = tile_rows,
                                        .most_sorted_ids = most_sorted_ids};

}  // namespace marlinq::cuda::sm80
