// Plans of the sm_80 kernels: pure host code, and the table that a plan selects from.
#include "cuda/arch/sm80/launch.hpp"

#include <algorithm>
#include <array>

#include "core/concat.hpp"
#include "core/integers.hpp"
#include "cuda/arch/sm80/layout.hpp"
#include "cuda/arch/sm80/load.hpp"
#include "cuda/arch/sm80/plan.hpp"
#include "marlinq/error.hpp"

namespace marlinq::cuda::sm80 {

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
  const StripMemory memory = strip_memory(w, EvenShare(strips, blocks), kernel.slice_bytes);
  const std::int64_t ring = std::int64_t{warps} * kernel.stages * memory.stage_bytes;
  const std::int64_t slots = std::int64_t{memory.groups - 1} * kernel.sum_bytes;
  const std::int64_t contributors = std::int64_t{memory.groups} * 4;
  return {.kind = KernelKind::kStrip,
          .instance = instance,
          .blocks = blocks,
          .warps = warps,
          .stages = kernel.stages,
          .shared_bytes = static_cast<std::int32_t>(
              std::min<std::int64_t>(ring + slots + contributors, INT32_MAX)),
          .tokens = kernel.tokens,
          .schedule = {},
          .dependent_launch = false};
}

GemmPlan tile_plan(const GemmProblem& problem, std::int32_t instance, std::int32_t shared_bytes,
                   std::int32_t blocks, std::int32_t tail_blocks, std::int32_t stages) {
  const WeightView& w = problem.weight;
  const Instance& kernel =
      instances(problem.x_type, w.code_bits)[static_cast<std::size_t>(instance)];
  const std::int64_t tiles =
      ceil_div(w.n, kernel.features) * ceil_div(problem.m, kernel.tokens);
  const std::int64_t stage = std::int64_t{kernel.row_warps} *
                             slice_bytes(w, kernel.slice_bytes, kernel.features);
  // Each thread keeps 8 scales.
  const std::int64_t scales = std::int64_t{kernel.warps} * 32 * 32;
  const auto fitting = static_cast<std::int32_t>(
      std::clamp<std::int64_t>((shared_bytes - scales) / stage, 2, stages));
  const auto waves = static_cast<std::int32_t>(tiles / blocks);
  const auto left = static_cast<std::int32_t>(tiles % blocks);
  // Tiles that are walked through together should share what they read: a band of token tiles about
  // as wide as the features of a wave are many.
  constexpr std::int32_t kTokenBand = 8;
  return {.kind = KernelKind::kTile,
          .instance = instance,
          .blocks = waves > 0 ? blocks : tail_blocks,
          .warps = kernel.warps,
          .stages = fitting,
          .shared_bytes = static_cast<std::int32_t>(
              std::min<std::int64_t>(
                  std::max<std::int64_t>(stage * fitting, kernel.sum_bytes) + scales, INT32_MAX)),
          .tokens = INT32_MAX,
          .schedule = {.whole_tiles = waves,
                       .tail_tiles = left,
                       .tail_blocks = left > 0 ? tail_blocks : 0,
                       .token_band = kTokenBand},
          .dependent_launch = false};
}

namespace {

// The static shared memory of a kernel, which counts towards the same limit.
constexpr std::int32_t kStaticShared = 256;

std::int32_t usable_shared(const DeviceLimits& limits) {
  return limits.shared_bytes - kStaticShared;
}

// Few tokens: the warps that fill a multiprocessor, and the stages that keep it fed.
GemmPlan plan_strips(const GemmProblem& problem, std::int32_t instance,
                     const DeviceLimits& limits) {
  const WeightView& w = problem.weight;
  const Instance& kernel =
      instances(problem.x_type, w.code_bits)[static_cast<std::size_t>(instance)];
  // Two kernels share a multiprocessor while one hands over to the next, which hides the start of
  // small layers. In large ones it would let two blocks of one kernel meet, and double its time:
  // ask for more than half there.
  constexpr std::int64_t kLargeLayer = std::int64_t{24} << 20;
  const std::int64_t code_bytes =
      std::int64_t{w.n} * w.chunks * Layout::kChunkRows * w.code_bits / 8;
  const std::int32_t usable = usable_shared(limits);
  GemmPlan best;
  best.shared_bytes = INT32_MAX;
  const std::int32_t warps = ceil_div(strip_count(w), limits.multiprocessors) <= 2
                                 ? kernel.warps
                                 : std::min(kernel.warps, 8);
  for (std::int32_t use = warps; use >= 1 && best.shared_bytes > usable; use /= 2) {
    best = strip_plan(problem, instance, limits.multiprocessors, use);
  }
  if (code_bytes > kLargeLayer) {
    best.shared_bytes = std::max(best.shared_bytes, usable / 2 + 1024);
  }
  return best;
}

}  // namespace

GemmPlan plan(const GemmProblem& problem, const DeviceLimits& limits, BatchInvariance invariance) {
  const std::int32_t usable = usable_shared(limits);
  const std::span<const Instance> all = instances(problem.x_type, problem.weight.code_bits);
  const bool invariant = invariance == BatchInvariance::kRequired;
  const std::int32_t most_tokens = all[1].tokens;  // of a strip kernel
  GemmPlan best;
  bool found = false;
  if ((problem.m <= most_tokens && !invariant) || !problem.weight.scales_divide) {
    best = plan_strips(problem, problem.m <= all[0].tokens && !invariant ? 0 : 1, limits);
    found = best.shared_bytes <= usable;
  }
  double least = 0;
  for (std::size_t i = 2; i < all.size() && !found; ++i) {
    const Instance& kernel = all[i];
    (void)kernel;
  }
  if (!found) {
    for (std::size_t i = 2; i < all.size(); ++i) {
      const Instance& kernel = all[i];
      const std::int64_t token_tiles = ceil_div(problem.m, kernel.tokens);
      const std::int64_t tiles = ceil_div(problem.weight.n, kernel.features) * token_tiles;
      const std::int32_t blocks = limits.multiprocessors;
      for (std::int32_t tail = 1; tail <= 2; ++tail) {
        const auto left = static_cast<std::int32_t>(tiles % blocks);
        const std::int32_t tail_blocks =
            tail == 1 || invariant
                ? left
                : static_cast<std::int32_t>(std::min<std::int64_t>(
                      blocks, std::int64_t{left} * problem.weight.chunks / 4));
        if (tail_blocks < left) continue;
        const GemmPlan candidate =
            tile_plan(problem, static_cast<std::int32_t>(i), usable, blocks, tail_blocks, 4);
        if (candidate.shared_bytes > usable) continue;
        const double work = static_cast<double>(kernel.features) * kernel.tokens;
        const double cost =
            work * (static_cast<double>(tiles / blocks) +
                    (left > 0 ? static_cast<double>(left) / tail_blocks : 0.0)) *
            (kernel.tokens == 32 ? 1.2 : 1.0);
        if (!found || cost < least) {
          best = candidate;
          least = cost;
          found = true;
        }
      }
    }
  }
  if (!found) {
    throw Error(ErrorCode::kInternal,
                concat("sm80: no kernel for ", problem.m, " tokens x ", problem.weight.n,
                       " features fits ", limits.shared_bytes, " bytes of shared memory"));
  }
  best.dependent_launch = limits.capability >= 90;
  return best;
}

void launch(const GemmProblem& problem, const GemmPlan& plan, const SplitScratch& scratch,
            void* stream) {
  const Instance& kernel = instances(problem.x_type, problem.weight.code_bits)
      [static_cast<std::size_t>(plan.instance)];
  constexpr std::int64_t kXSize = 2;
  const std::int64_t y_size = problem.y_type == FloatType::kF32 ? 4 : 2;
  for (std::int64_t first = 0; first < problem.m; first += plan.tokens) {
    GemmProblem part = problem;
    part.x = static_cast<const unsigned char*>(problem.x) + first * problem.x_stride * kXSize;
    part.y = static_cast<unsigned char*>(problem.y) + first * problem.y_stride * y_size;
    part.m = static_cast<std::int32_t>(std::min<std::int64_t>(plan.tokens, problem.m - first));
    kernel.launch(part, plan, scratch, static_cast<cudaStream_t>(stream));
  }
}

namespace {

void scratch_need(const DeviceLimits& limits, std::int64_t& partial_floats,
                  std::int32_t& counters) {
  // A block has at most two parts of tiles.
  partial_floats = 0;
  for (const Instance& instance : instances(FloatType::kF16, 4)) {
    if (instance.kind != KernelKind::kTile) continue;
    partial_floats = std::max<std::int64_t>(
        partial_floats,
        std::int64_t{2} * limits.multiprocessors * instance.tokens * instance.features);
  }
  counters = limits.multiprocessors;
}

}  // namespace

extern const ArchKernels kKernels;
constinit const ArchKernels kKernels = {.name = "sm80",
                                        .priority = 80,
                                        .min_capability = 80,
                                        .requirement = "compute capability 8.0",
                                        .pack = load,
                                        .plan = plan,
                                        .scratch_need = scratch_need,
                                        .launch = launch};

}  // namespace marlinq::cuda::sm80
