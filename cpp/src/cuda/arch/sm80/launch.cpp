// Plans of the sm_80 kernels: pure host code, and the table that a plan selects from.
#include "cuda/arch/sm80/launch.hpp"

#include <algorithm>
#include <span>

#include "core/concat.hpp"
#include "core/integers.hpp"
#include "cuda/arch/sm80/layout.hpp"
#include "cuda/arch/sm80/pack.hpp"
#include "marlinq/error.hpp"

namespace marlinq::cuda::sm80 {

constexpr std::size_t kInstanceCount = 14;
extern const Instance kInstances_fp16_w4[kInstanceCount];
extern const Instance kInstances_fp16_w8[kInstanceCount];
extern const Instance kInstances_bf16_w4[kInstanceCount];
extern const Instance kInstances_bf16_w8[kInstanceCount];

namespace {

constexpr std::int32_t kMaxSplits = 16;

std::span<const Instance> instances(FloatType type, std::int32_t code_bits) {
  if (type == FloatType::kF16) return code_bits == 4 ? kInstances_fp16_w4 : kInstances_fp16_w8;
  return code_bits == 4 ? kInstances_bf16_w4 : kInstances_bf16_w8;
}

GemmPlan strip_plan(const Instance& instance, const WeightView& weight,
                    const DeviceLimits& limits) {
  const std::int64_t groups = ceil_div(weight.n, instance.feature_tile);
  const std::int64_t blocks = std::min<std::int64_t>(groups, limits.multiprocessors);
  const std::int64_t slots = ceil_div(groups, blocks) + instance.warps;
  // Two kernels share a multiprocessor while one hands over to the next, which hides the start of
  // small layers. In large ones it would let two blocks of one kernel meet, and double its time:
  // ask for more than half there.
  constexpr std::int64_t kLargeLayer = std::int64_t{24} << 20;
  constexpr std::int64_t kMoreThanHalf = 116 << 10;
  const std::int64_t code_bytes =
      std::int64_t{weight.n} * weight.packed_rows * weight.code_bits / 8;
  std::int64_t shared = instance.ring_bytes + slots * instance.slot_bytes;
  if (code_bytes > kLargeLayer)
    shared = std::max(shared, std::min<std::int64_t>(kMoreThanHalf, limits.shared_bytes));
  return {.kind = KernelKind::kStrip,
          .token_tile = instance.token_tile,
          .feature_tile = instance.feature_tile,
          .blocks = static_cast<std::int32_t>(blocks),
          .shared_bytes = static_cast<std::int32_t>(shared)};
}

// Strips of the busiest block.
std::int64_t strip_load(const GemmPlan& plan, const WeightView& weight) {
  return ceil_div(ceil_div(weight.n, plan.feature_tile), plan.blocks) * plan.feature_tile;
}

GemmPlan tile_plan(const Instance& instance, const WeightView& weight, std::int64_t token_tiles,
                   const DeviceLimits& limits) {
  const std::int64_t tiles = ceil_div(weight.n, instance.feature_tile) * token_tiles;
  // As many splits of K as fill the device once, none shorter than 4 chunks.
  constexpr std::int64_t kMinChunks = 4;
  const std::int64_t chunks = weight.packed_rows / Layout::kRowAlignment;
  const std::int64_t wanted =
      std::clamp<std::int64_t>(limits.multiprocessors / tiles, 1, kMaxSplits);
  return {
      .kind = KernelKind::kTile,
      .token_tile = instance.token_tile,
      .feature_tile = instance.feature_tile,
      .splits = static_cast<std::int32_t>(std::clamp<std::int64_t>(chunks / kMinChunks, 1, wanted)),
      .shared_bytes = instance.ring_bytes};
}

GemmPlan plan(const GemmProblem& problem, const DeviceLimits& limits, BatchInvariance invariance) {
  const bool invariant = invariance == BatchInvariance::kRequired;
  GemmPlan best;
  bool found = false;
  for (const Instance& instance : instances(problem.x_type, problem.weight.code_bits)) {
    GemmPlan candidate;
    if (instance.kind == KernelKind::kStrip) {
      // The fewest tokens that hold m; then the least work of the busiest block, then more strips a
      // warp.
      if (invariant || problem.m > instance.token_tile ||
          (problem.m <= 8 && instance.token_tile > 8))
        continue;
      candidate = strip_plan(instance, problem.weight, limits);
      if (candidate.shared_bytes > limits.shared_bytes) continue;
      if (found && strip_load(candidate, problem.weight) > strip_load(best, problem.weight))
        continue;
    } else {
      // One tile for every m where rows must not depend on the batch.
      if (found && best.kind == KernelKind::kStrip) continue;
      const bool small = instance.token_tile == 32;
      if (invariant ? !small : small != (problem.m <= 32)) continue;
      const std::int64_t token_tiles = invariant ? 1 : ceil_div(problem.m, instance.token_tile);
      candidate = tile_plan(instance, problem.weight, token_tiles, limits);
      if (candidate.shared_bytes > limits.shared_bytes) continue;
      // The widest tile that fills the device without splitting K, else the narrowest.
      if (found && best.splits == 1 &&
          ceil_div(problem.weight.n, best.feature_tile) * token_tiles * 4 >=
              3 * limits.multiprocessors) {
        continue;
      }
    }
    best = candidate;
    found = true;
  }
  best.dependent_launch = limits.capability >= 90;
  return best;
}

void scratch_need(const DeviceLimits& limits, std::int64_t& partial_floats,
                  std::int32_t& counters) {
  // K is split only where the tiles alone do not fill the device.
  partial_floats = 0;
  for (const Instance& instance : instances(FloatType::kF16, 4)) {
    if (instance.kind != KernelKind::kTile) continue;
    partial_floats =
        std::max<std::int64_t>(partial_floats, std::int64_t{limits.multiprocessors} *
                                                   instance.token_tile * instance.feature_tile);
  }
  counters = limits.multiprocessors;
}

void launch(const GemmProblem& problem, const GemmPlan& plan, const SplitScratch& scratch,
            void* stream) {
  for (const Instance& instance : instances(problem.x_type, problem.weight.code_bits)) {
    if (instance.kind != plan.kind || instance.token_tile != plan.token_tile ||
        instance.feature_tile != plan.feature_tile) {
      continue;
    }
    // A split product's partial sums must fit the scratch: token tiles that do not are launched in
    // turn.
    std::int64_t token_tiles = ceil_div(problem.m, plan.token_tile);
    if (plan.splits > 1) {
      const std::int64_t feature_tiles = ceil_div(problem.weight.n, plan.feature_tile);
      const std::int64_t floats =
          std::int64_t{plan.token_tile} * plan.feature_tile * plan.splits * feature_tiles;
      token_tiles =
          std::max<std::int64_t>(1, std::min({token_tiles, scratch.partial_floats / floats,
                                              scratch.num_counters / feature_tiles}));
    }
    const auto rows = static_cast<std::int32_t>(token_tiles * plan.token_tile);
    const std::int64_t x_size = 2;
    const std::int64_t y_size = problem.y_type == FloatType::kF32 ? 4 : 2;
    for (std::int32_t first = 0; first < problem.m; first += rows) {
      GemmProblem part = problem;
      part.x = static_cast<const unsigned char*>(problem.x) + first * problem.x_stride * x_size;
      part.y = static_cast<unsigned char*>(problem.y) + first * problem.y_stride * y_size;
      part.m = std::min(rows, problem.m - first);
      instance.launch(part, plan, scratch, static_cast<cudaStream_t>(stream));
    }
    return;
  }
  throw Error(ErrorCode::kInternal, concat("sm80: no kernel for a tile of ", plan.token_tile,
                                           " tokens x ", plan.feature_tile, " features"));
}

}  // namespace

extern const ArchKernels kKernels;
constinit const ArchKernels kKernels = {.name = "sm80",
                                        .priority = 80,
                                        .min_capability = 80,
                                        .requirement = "compute capability 8.0",
                                        .pack = pack,
                                        .plan = plan,
                                        .scratch_need = scratch_need,
                                        .launch = launch};

}  // namespace marlinq::cuda::sm80
