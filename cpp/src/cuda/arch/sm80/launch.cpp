// Plans of the sm_80 kernels: pure host code, and the table that a plan selects from.
#include "cuda/arch/sm80/launch.hpp"

#include <algorithm>
#include <array>
#include <span>

#include "core/concat.hpp"
#include "core/integers.hpp"
#include "cuda/arch/sm80/layout.hpp"
#include "cuda/arch/sm80/pack.hpp"
#include "marlinq/error.hpp"

namespace marlinq::cuda::sm80 {

constexpr std::size_t kTiles = 4;
extern const Instance kInstances_fp16_w4[kTiles];
extern const Instance kInstances_fp16_w8[kTiles];
extern const Instance kInstances_bf16_w4[kTiles];
extern const Instance kInstances_bf16_w8[kTiles];

namespace {

struct Tile {
  std::int32_t tokens;
  std::int32_t features;
};
constexpr std::array<Tile, kTiles> kTileTable = {{{8, 64}, {16, 64}, {32, 128}, {64, 256}}};
constexpr std::int32_t kMaxSplits = 16;

std::span<const Instance> instances(FloatType type, std::int32_t code_bits) {
  if (type == FloatType::kF16) return code_bits == 4 ? kInstances_fp16_w4 : kInstances_fp16_w8;
  return code_bits == 4 ? kInstances_bf16_w4 : kInstances_bf16_w8;
}

}  // namespace

GemmPlan plan(const WeightView& weight, std::int32_t m, const DeviceLimits& limits, BatchInvariance invariance) {
  // One tile for every m where rows must not depend on the batch.
  const auto* tile = invariance == BatchInvariance::kRequired
                         ? &kTileTable[2]
                         : std::find_if(kTileTable.begin(), kTileTable.end() - 1,
                                        [m](const Tile& candidate) { return m <= candidate.tokens; });
  const std::int64_t tiles = ceil_div(weight.n, tile->features) *
                             (invariance == BatchInvariance::kRequired ? 1 : ceil_div(m, tile->tokens));
  // As many splits of K as fill the device once, none shorter than 4 chunks.
  const std::int64_t chunks = weight.packed_rows / Layout::kRowAlignment;
  const std::int64_t wanted = std::max<std::int64_t>(1, limits.multiprocessors / std::max<std::int64_t>(tiles, 1));
  constexpr std::int64_t kMinChunks = 4;
  const std::int64_t splits = std::clamp<std::int64_t>(chunks / kMinChunks, 1, std::min<std::int64_t>(wanted, kMaxSplits));
  return {.token_tile = tile->tokens, .feature_tile = tile->features, .splits = static_cast<std::int32_t>(splits)};
}

void scratch_need(const DeviceLimits& limits, std::int64_t& partial_floats, std::int32_t& counters) {
  // Splitting stops where the tiles alone fill the device, except in batch-invariant mode, where token tiles do not
  // count: there the launch loops over them.
  partial_floats = 0;
  for (const Tile& tile : kTileTable) {
    partial_floats = std::max<std::int64_t>(partial_floats, std::int64_t{limits.multiprocessors} * tile.tokens * tile.features);
  }
  counters = limits.multiprocessors;
}

void launch(const GemmProblem& problem, const GemmPlan& plan, const SplitScratch& scratch, void* stream) {
  for (const Instance& instance : instances(problem.x_type, problem.weight.code_bits)) {
    if (instance.token_tile != plan.token_tile || instance.feature_tile != plan.feature_tile) continue;
    // A split product's partial sums must fit the scratch: token tiles that do not are launched in turn.
    const std::int64_t feature_tiles = ceil_div(problem.weight.n, plan.feature_tile);
    const std::int64_t floats = std::int64_t{plan.token_tile} * plan.feature_tile * plan.splits * feature_tiles;
    const std::int64_t at_once =
        plan.splits == 1 ? ceil_div(problem.m, plan.token_tile)
                         : std::max<std::int64_t>(1, std::min(scratch.partial_floats / floats,
                                                              scratch.num_counters / feature_tiles));
    const auto rows = static_cast<std::int32_t>(at_once * plan.token_tile);
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
  throw Error(ErrorCode::kInternal, concat("sm80: no kernel for a tile of ", plan.token_tile, " tokens x ",
                                           plan.feature_tile, " features"));
}

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
