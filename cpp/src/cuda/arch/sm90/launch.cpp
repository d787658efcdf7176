// Plans of the sm90 kernels: pure host code, and the table that a plan selects from.
#include "cuda/arch/sm90/launch.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>

#include "core/integers.hpp"
#include "cuda/arch/sm80/experts.hpp"
#include "cuda/arch/sm80/load.hpp"
#include "cuda/arch/sm80/plan.hpp"
#include "cuda/arch/sm90/experts.hpp"
#include "cuda/arch/sm90/tile_plan.hpp"

namespace marlinq::cuda::sm90 {

extern const ArchKernels kKernels;
extern const std::array<Instance, kInstanceCount> kInstances_fp16_w4;
extern const std::array<Instance, kInstanceCount> kInstances_fp16_w8;
extern const std::array<Instance, kInstanceCount> kInstances_bf16_w4;
extern const std::array<Instance, kInstanceCount> kInstances_bf16_w8;

std::span<const Instance> instances(FloatType type, std::int32_t code_bits) {
  if (type == FloatType::kF16) return code_bits == 4 ? kInstances_fp16_w4 : kInstances_fp16_w8;
  return code_bits == 4 ? kInstances_bf16_w4 : kInstances_bf16_w8;
}

namespace {

constexpr std::int32_t kFirstInstance = sm80::kInstanceCount;

const Instance& instance_of(const GemmProblem& problem, std::int32_t index) {
  return instances(problem.x_type, problem.weight.code_bits)[static_cast<std::size_t>(index)];
}

/// Blocks, or clusters of them, that share out the tiles.
std::int32_t tile_units(const Instance& kernel, const DeviceLimits& limits) {
  return limits.multiprocessors / kernel.cluster_blocks;
}

/// The tiles of such a unit.
std::int64_t tile_count(const Instance& kernel, const GemmProblem& problem) {
  return ceil_div(problem.weight.n,
                  kernel.cluster_blocks * kernel.blocks * sm80::Layout::kBlockFeatures) *
         ceil_div(problem.m, kernel.tokens);
}

std::int32_t narrow(std::int64_t value) {
  return static_cast<std::int32_t>(std::min<std::int64_t>(value, INT32_MAX));
}

}  // namespace

GemmPlan strip_plan(const GemmProblem& problem, std::int32_t index, const StripChoice& choice) {
  const Instance& kernel = instance_of(problem, index);
  GemmProblem slice = problem;
  slice.m = std::min(problem.m, kernel.tokens);
  StripChoice complete = choice;
  complete.warps = kernel.warps;
  complete.item_chunks = kernel.item_chunks;
  complete.streams_x = kernel.streams_x;
  const StripMemory memory = strip_memory(slice, kernel.tokens, kernel.slot_bytes, complete);
  const bool sums_fit = std::int64_t{choice.stages} * memory.stage_bytes >= kernel.slot_bytes;
  return {.kind = KernelKind::kStrip,
          .instance = kFirstInstance + index,
          .blocks = choice.clusters * choice.cluster_blocks,
          .warps = kernel.warps,
          .cluster_blocks = choice.cluster_blocks,
          .shared_bytes = sums_fit ? narrow(memory.bytes) : INT32_MAX,
          .tokens = kernel.tokens,
          .schedule = {},
          .stages = choice.stages,
          .early_stages = choice.early_stages,
          .share_halves = choice.share_halves,
          .dependent_launch = true};
}

GemmPlan tile_plan(const GemmProblem& problem, std::int32_t index, const DeviceLimits& limits,
                   std::int32_t tail_units) {
  const WeightView& w = problem.weight;
  const Instance& kernel = instance_of(problem, index);
  const std::int32_t units = tile_units(kernel, limits);
  const std::int64_t tiles = tile_count(kernel, problem);
  const std::int32_t stage = kernel.stage_bytes + stage_rest(w, kernel.blocks, kernel.stage_chunks);
  const std::int32_t other = kernel.output_bytes + kOtherTileBytes;
  const std::int32_t stages = std::max(limits.shared_bytes - other, 0) / stage;
  const bool fits = stages >= 2;
  const auto waves = static_cast<std::int32_t>(tiles / units);
  const auto left = static_cast<std::int32_t>(tiles % units);
  // Tiles that are walked through together should share what they read: about as many bytes of x as of codes.
  constexpr std::int32_t kBandTokens = 1024;
  return {.kind = KernelKind::kTile,
          .instance = kFirstInstance + index,
          .blocks = kernel.cluster_blocks * (waves > 0 ? units : tail_units),
          .warps = kernel.warps,
          .cluster_blocks = kernel.cluster_blocks,
          .shared_bytes = fits ? other + stages * stage : INT32_MAX,
          .tokens = INT32_MAX,
          .schedule = {.whole_tiles = waves,
                       .tail_tiles = left,
                       .tail_blocks = left > 0 ? tail_units : 0,
                       .token_band = std::max(kBandTokens / kernel.tokens, 1)},
          .stages = stages,
          .early_stages = stages,
          .share_halves = 1,
          .dependent_launch = true};
}

GemmPlan tile_pairs_plan(const GemmProblem& problem, std::int32_t index, const DeviceLimits& limits,
                         std::int32_t parts) {
  const std::int32_t tiles = narrow(tile_count(instance_of(problem, index), problem));
  const bool possible = instance_of(problem, index).may_share_tile && parts % 2 == 0 &&
                        std::int64_t{tiles} * parts <= limits.multiprocessors;
  GemmPlan plan = tile_plan(problem, index, limits, possible ? tiles * parts : 1);
  plan.cluster_blocks = 2;
  plan.schedule.pair_parts = parts;
  if (!possible) plan.shared_bytes = INT32_MAX;
  return plan;
}

GemmPlan cut_tile_plan(const GemmProblem& problem, std::int32_t index, const DeviceLimits& limits,
                       std::int32_t parts) {
  const Instance& kernel = instance_of(problem, index);
  const std::int32_t units = tile_units(kernel, limits);
  GemmPlan plan = tile_plan(problem, index, limits, 1);
  // A multiple of the parts, so that those of a tile are in one wave.
  plan.blocks =
      kernel.cluster_blocks * static_cast<std::int32_t>(std::min<std::int64_t>(
                                  units - units % parts, tile_count(kernel, problem) * parts));
  plan.schedule = {.token_band = plan.schedule.token_band, .parts = parts};
  return plan;
}

namespace {

GemmPlan no_plan() {
  GemmPlan plan;
  plan.shared_bytes = INT32_MAX;
  return plan;
}

bool fits(const GemmPlan& plan, const DeviceLimits& limits) {
  return plan.shared_bytes <= limits.shared_bytes;
}

// The strip kernel of this shape.
std::int32_t strip_index(const GemmProblem& problem, std::int32_t token_tiles, bool streams_x,
                         std::int32_t warps) {
  const std::span<const Instance> all = instances(problem.x_type, problem.weight.code_bits);
  const auto found = std::find_if(all.begin(), all.end(), [&](const Instance& kernel) {
    return kernel.kind == KernelKind::kStrip && kernel.tokens == token_tiles * 8 &&
           kernel.streams_x == streams_x && kernel.warps == warps;
  });
  return static_cast<std::int32_t>(found - all.begin());
}

// Of packed blocks: what the features are divided by.
std::int64_t halves_of(const WeightView& w) {
  return ceil_div(w.n, sm80::Layout::kBlockFeatures) * 2;
}

// What a block of 8 warps streams, in rings of one stage, if it has so many halves and one of so many slices of K.
std::int64_t rings_of(const WeightView& w, std::int64_t halves, std::int32_t slices) {
  constexpr std::int64_t kRingBytes = 8 * 4096;
  return ceil_div(halves * (sm80::Layout::kBlockFeatures / 2) * ceil_div(w.chunks, slices) *
                      sm80::Layout::kChunkRows * w.code_bits / 8,
                  kRingBytes);
}

// So many are in the rings before the kernel before has ended.
constexpr std::int64_t kRingsOfWhole = 2;

// A block at most on a multiprocessor. Two of this kernel would meet on one that has none of the kernel before, or is done
// with it sooner than others.
void keep_apart(GemmPlan& plan, const DeviceLimits& limits) {
  if (plan.blocks <= limits.multiprocessors)
    plan.shared_bytes = std::max(plan.shared_bytes, limits.multiprocessor_shared_bytes / 2);
}

/// How the features are divided.
struct StripDivision {
  std::int32_t cluster_blocks;
  std::int32_t clusters;
  std::int64_t busiest;       // halves of a cluster, at most
  std::int32_t share_halves;  // StripChoice::share_halves
};

// As few halves as can be for the busiest cluster, and then as few clusters as that takes.
StripDivision divide_strips(const WeightView& w, std::int32_t blocks, std::int32_t cluster_blocks) {
  const std::int64_t halves = halves_of(w);
  const std::int64_t busiest = ceil_div(halves, std::max(blocks / cluster_blocks, 1));
  return {cluster_blocks, narrow(ceil_div(halves, busiest)), busiest, busiest % 2 == 0 ? 2 : 1};
}

// All the clusters that there are.
StripDivision spread_strips(const WeightView& w, std::int32_t blocks, std::int32_t cluster_blocks) {
  const std::int64_t halves = halves_of(w);
  const std::int64_t clusters = std::clamp<std::int64_t>(blocks / cluster_blocks, 1, halves);
  return {cluster_blocks, narrow(clusters), ceil_div(halves, clusters), 1};
}

// What an item of so many halves of packed blocks takes: 3 for two that are a block, 2 for one.
std::int64_t item_units(std::int64_t halves) { return halves + ceil_div(halves, 2); }

// How much longer strips take where a slab has several groups, about.
double short_groups(const WeightView& w, double each) { return 1 + each * (slab_groups(w) - 1); }

// The same of tiles, fitted to an H200. What a group adds is beside products, the more of it the more tokens there are.
double short_groups(const GemmProblem& problem, const Instance& kernel) {
  const WeightView& w = problem.weight;
  if (slab_groups(w) == 1) return 1;
  const std::int32_t warpgroups = kernel.warps / 4 - 1;
  const bool half = problem.x_type == FloatType::kF16;
  const double group = half ? 0.05 * kernel.blocks / warpgroups : 0.13;
  const double most_tokens = half ? 110 : 150;
  return 1 + group * slab_groups(w) * std::max(1 - kernel.tokens / most_tokens, 0.0);
}

/// What a strip kernel of 2 or 3 token tiles takes, in the units of TileCost. Fitted to lines of tests/bench/sm90_plans of 28
/// layers, on an H100 and an H200; kernels got quicker since, which is measured on an H200 alone.
struct StripCost {
  double start[2];    // with 8 and 12 warps
  double busiest[2];  // 100 units of items in the block that has most
  double mean;        // ... in the mean of all multiprocessors
  double bytes[2];    // a MB of codes and scales, where memory is slow or fast
  double cluster;     // clusters of two blocks
  double idle;        // where some multiprocessors have nothing to do
  double block;       // each packed block but the first of a strip block
  double group[2];    // by which items take longer for each group of a slab but the first, as start
  double fast;        // what the busiest and the mean are times where memory is fast
};
constexpr StripCost kStripCosts[] = {
    {{3.173, 3.368}, {2.728, 2.422}, 1.546, {0.100, 0.078}, 0.027, 0.195, 0.105, {0.10, 0.04}, 0.9},
    {{2.835, 2.835},
     {4.365, 4.365},
     2.173,
     {0.028, 0.028},
     0.196,
     0.432,
     0.363,
     {0.08, 0.08},
     0.82}};

/// A plan, and what it is thought to take, in the units of TileCost.
struct PricedPlan {
  GemmPlan plan;
  double cost = std::numeric_limits<double>::infinity();
};

/// Plans of strips for so many token tiles of 8.
class StripPlanner {
 public:
  StripPlanner(const GemmProblem& problem, std::int32_t token_tiles, const DeviceLimits& limits)
      : problem_(problem),
        w_(problem.weight),
        limits_(limits),
        token_tiles_(token_tiles),
        tokens_(std::min(problem.m, token_tiles * 8)) {
    const Instance& kernel = instance_of(problem, strip_index(problem, token_tiles, true, kWarps));
    items_ = ceil_div(w_.chunks, kernel.item_chunks);
    // A slice of K for each of two blocks, where both have some items.
    constexpr std::int64_t kLeastChunks = 16;
    most_slices_ = w_.chunks >= kLeastChunks ? 2 : 1;
  }

  /// One token tile has no cost: nothing stands in for strips there.
  PricedPlan plan() const {
    if (token_tiles_ == 1) return {plan_one_tile(), 0.0};
    return token_tiles_ == kMostTokenTiles ? plan_most_tiles() : plan_more_tiles();
  }

  static constexpr std::int32_t kMostTokenTiles = 4;

 private:
  static constexpr std::int32_t kWarps = 8;
  static constexpr std::int32_t kMoreWarps = 12;

  /// Stages of a ring, and those filled before the kernel before has ended.
  struct Rings {
    std::int32_t stages;
    std::int32_t early;
  };
  // More that is asked for before x would only delay it.
  static constexpr Rings kShortRings{2, 1};
  static constexpr Rings kThreeStages{3, 3};

  // x comes with the codes, unless what a block needs of it is short; or, with few tokens, unless the rings would
  // have no room for that.
  bool has_short_x(std::int32_t slices) const {
    constexpr std::int64_t kShortBytes = 12288;
    return tokens_ == 1 || std::int64_t{tokens_} * ceil_div(w_.k, slices) * 2 <= kShortBytes;
  }
  // Whether x is streamed: the ways to have it, the best first.
  std::span<const bool> ways_to_have_x(std::int32_t slices) const {
    static constexpr bool kWholeFirst[] = {false, true};
    static constexpr bool kStreamedFirst[] = {true, false};
    constexpr std::int32_t kFewTokens = 2;
    if (has_short_x(slices)) return kWholeFirst;
    return std::span(kStreamedFirst).first(tokens_ <= kFewTokens ? 2 : 1);
  }

  GemmPlan plan_of(const StripChoice& choice, std::int32_t warps, bool streams_x) const {
    // An item for each warp, also of the block that has the fewest.
    const std::int64_t least = strip_shares(w_, choice) / choice.clusters * choice.share_halves;
    if (ceil_div(least, 2) * (items_ / choice.cluster_blocks) < warps) return no_plan();
    return strip_plan(problem_, strip_index(problem_, token_tiles_, streams_x, warps), choice);
  }

  GemmPlan plan_of(const StripDivision& division, const Rings& rings, std::int32_t warps,
                   bool streams_x) const {
    return plan_of({.clusters = division.clusters,
                    .cluster_blocks = division.cluster_blocks,
                    .share_halves = division.share_halves,
                    .stages = rings.stages,
                    .early_stages = rings.early},
                   warps, streams_x);
  }

  GemmPlan one_each(const StripDivision& division, const Rings& rings, std::int32_t warps,
                    bool streams_x) const {
    GemmPlan plan = plan_of(division, rings, warps, streams_x);
    keep_apart(plan, limits_);
    return plan;
  }

  GemmPlan plan_one_tile() const {
    const StripDivision single = divide_strips(w_, limits_.multiprocessors, most_slices_);
    const std::int64_t rings = rings_of(w_, single.busiest, most_slices_);
    const std::int64_t clusters = limits_.multiprocessors / most_slices_;
    if (rings <= kRingsOfWhole && halves_of(w_) >= clusters) {
      // All of the layer is in the rings before the kernel before has ended, beside which a block has room
      // on every multiprocessor.
      constexpr Rings kWhole{2, 2};
      return plan_of(spread_strips(w_, limits_.multiprocessors, most_slices_), kWhole, kWarps,
                     !has_short_x(most_slices_));
    }
    // Where memory is slow, and with 8 bits, the bytes are the bound: one block, whose rings are long. If that would leave
    // some multiprocessors with less to do, two blocks are quicker.
    constexpr std::int64_t kManyRings = 8;
    constexpr double kEven = 0.9;
    const bool slow = !has_fast_memory(limits_);
    if (!slow && w_.code_bits == 4) {
      const GemmPlan plan = plan_many_halves(single);
      if (fits(plan, limits_)) return plan;
    }
    const bool even = static_cast<double>(halves_of(w_)) >=
                      kEven * static_cast<double>(clusters * single.busiest);
    const bool bytes_bound = w_.code_bits == 8 || (slow && rings > kManyRings && even);
    const GemmPlan plan =
        bytes_bound ? plan_long_rings(single, rings >= kManyRings) : plan_two_each(rings);
    if (fits(plan, limits_)) return plan;
    for (const Rings& few :
         {slow && rings > kRingsOfWhole ? kThreeStages : kShortRings, kShortRings}) {
      if (has_short_x(single.cluster_blocks)) {
        const GemmPlan whole = one_each(single, few, kWarps, false);
        if (fits(whole, limits_)) return whole;
      }
      const GemmPlan streamed = one_each(single, few, kWarps, true);
      if (fits(streamed, limits_)) return streamed;
    }
    return no_plan();
  }

  // What two blocks on a multiprocessor gain at their start is little where each has many features: one block then, of
  // whole packed blocks if some division has them, else as many as there are.
  GemmPlan plan_many_halves(const StripDivision& cut) const {
    constexpr std::int64_t kManyHalves = 7;
    const StripDivision whole = divide_strips(w_, limits_.multiprocessors, 1);
    if (whole.busiest < kManyHalves) return no_plan();
    const StripDivision spread = spread_strips(w_, limits_.multiprocessors, most_slices_);
    const StripDivision& division = whole.busiest % 2 == 0 ? whole
                                    : cut.busiest % 2 == 0 ? cut
                                                           : spread;
    return has_short_x(division.cluster_blocks) ? plan_long_rings(division, true)
                                                : one_each(division, kShortRings, kWarps, true);
  }

  // Two blocks on a multiprocessor have enough warps to hide what each waits for. K is cut where it takes that for
  // all of them to have features, or whole packed blocks: half of one takes more than half of the time.
  GemmPlan plan_two_each(std::int64_t rings) const {
    const auto divide = [&](std::int32_t slices) {
      return divide_strips(w_, 2 * limits_.multiprocessors, slices);
    };
    const bool cut_first =
        most_slices_ == 2 && divide(1).busiest % 2 != 0 && divide(2).busiest % 2 == 0;
    for (const std::int32_t slices : {cut_first ? 2 : 1, cut_first ? 1 : most_slices_}) {
      StripDivision twice = divide(slices);
      const std::int64_t least_halves = slices == 1 ? 3 : 2;
      // Whole packed blocks for so few of the blocks leave too much to those that have a second one beside them.
      const double few = has_fast_memory(limits_) ? 0.62 : 0.7;
      constexpr std::int64_t kSomeRings = 4;
      const std::int32_t most = 2 * limits_.multiprocessors / slices;
      if (twice.busiest == 2 && twice.clusters <= few * most &&
          (slices == 1 || rings > kSomeRings)) {
        twice = spread_strips(w_, 2 * limits_.multiprocessors, slices);
      } else if (twice.busiest < least_halves) {
        continue;
      }
      for (const bool streams_x : ways_to_have_x(slices)) {
        const GemmPlan plan = plan_of(twice, kShortRings, kWarps, streams_x);
        if (plan.shared_bytes <= limits_.multiprocessor_shared_bytes / 2 - sm80::kReservedShared)
          return plan;
      }
    }
    return no_plan();
  }

  GemmPlan plan_long_rings(const StripDivision& single, bool many) const {
    const bool streams_x = !has_short_x(single.cluster_blocks);
    for (std::int32_t stages = many ? 4 : 3; stages > 2; --stages) {
      const GemmPlan plan = one_each(single, {stages, many ? stages : 2}, kWarps, streams_x);
      if (fits(plan, limits_)) return plan;
    }
    return no_plan();
  }

  // The cheapest: K cut or not, with as few blocks as keep the busiest one as short as it can be, or all there are.
  PricedPlan plan_more_tiles() const {
    PricedPlan best{no_plan()};
    for (std::int32_t slices = 1; slices <= most_slices_; ++slices) {
      for (const StripDivision& division : {divide_strips(w_, limits_.multiprocessors, slices),
                                            spread_strips(w_, limits_.multiprocessors, slices)}) {
        for (const std::int32_t warps : {kWarps, kMoreWarps}) {
          // Items of a warp, of two halves each: few are shared out unevenly among more warps. Of short groups each
          // takes longer.
          const std::int64_t many_items = slab_groups(w_) > 1 ? 2 : 4;
          if (warps == kMoreWarps && (token_tiles_ != 2 || division.busiest * items_ / slices <
                                                               2 * many_items * kMoreWarps))
            continue;
          const GemmPlan plan = one_each(division, kShortRings, warps, true);
          const double cost = cost_of(plan);
          if (fits(plan, limits_) && cost < best.cost) best = {plan, cost};
        }
      }
    }
    return best;
  }

  double cost_of(const GemmPlan& plan) const {
    const StripCost& cost = kStripCosts[token_tiles_ - 2];
    const int more_warps = plan.warps == kMoreWarps ? 1 : 0;
    const std::int64_t clusters = plan.blocks / plan.cluster_blocks;
    const std::int64_t shares = halves_of(w_) / plan.share_halves;
    const std::int64_t least = shares / clusters * plan.share_halves;
    const std::int64_t more = shares % clusters;  // clusters that have one share more
    const std::int64_t most = least + (more > 0 ? plan.share_halves : 0);
    // A run of single halves may begin inside a packed block.
    const std::int64_t packed_blocks = plan.share_halves == 2 ? most / 2 : most / 2 + 1;
    const auto units = [&](std::int64_t halves, std::int64_t items) {
      return 0.01 * static_cast<double>(item_units(halves) * items) *
             short_groups(w_, cost.group[more_warps]) * (has_fast_memory(limits_) ? cost.fast : 1);
    };
    const double megabytes = static_cast<double>(w_.n) * w_.k * w_.code_bits / 8e6;
    constexpr double kWithScales = 1.03;
    return cost.start[more_warps] +
           cost.busiest[more_warps] * units(most, ceil_div(items_, plan.cluster_blocks)) +
           cost.mean *
               (static_cast<double>(more) * units(most, items_) +
                static_cast<double>(clusters - more) * units(least, items_)) /
               limits_.multiprocessors +
           cost.bytes[has_fast_memory(limits_) ? 1 : 0] * kWithScales * megabytes +
           (plan.cluster_blocks == 2 ? cost.cluster : 0) +
           (plan.blocks < limits_.multiprocessors ? cost.idle : 0) +
           cost.block * static_cast<double>(packed_blocks - 1);
  }

  // As even as it can be, and K not cut where that is as even and blocks have whole segments.
  PricedPlan plan_most_tiles() const {
    StripDivision division = divide_strips(w_, limits_.multiprocessors, 1);
    if (most_slices_ == 2) {
      constexpr double kBetter = 1.05;
      const StripDivision cut = divide_strips(w_, limits_.multiprocessors, 2);
      if (division.busiest < 2 ||
          static_cast<double>(division.busiest) * 2 > static_cast<double>(cut.busiest) * kBetter)
        division = cut;
    }
    // The start, and an item of a packed block: of the busiest strip block on an H200, of the mean of all on an H100.
    const bool fast = has_fast_memory(limits_);
    const double start = fast ? 3.2 : 4.2;
    const double item = fast ? 0.205 : 0.245;
    constexpr double kGroup = 0.13;
    const double items =
        fast ? static_cast<double>(item_units(division.busiest) *
                                   ceil_div(items_, division.cluster_blocks)) /
                   3
             : static_cast<double>(w_.n) * w_.chunks * w_.code_bits / 512 / limits_.multiprocessors;
    return {one_each(division, kShortRings, kWarps, true),
            start + items * item * short_groups(w_, kGroup)};
  }

  const GemmProblem& problem_;
  const WeightView& w_;
  const DeviceLimits& limits_;
  std::int32_t token_tiles_;
  std::int32_t tokens_;  // of a launch, at most
  std::int64_t items_;   // along K
  std::int32_t most_slices_;
};

double tile_cost(const GemmProblem& problem, const Instance& kernel, const GemmPlan& plan) {
  const std::int64_t slabs = ceil_div(problem.weight.chunks, kSlabChunks);
  const TileCost& cost = kernel.cost;
  const TileSchedule& schedule = plan.schedule;
  const double slab = cost.slab * short_groups(problem, kernel);
  double time = cost.start + static_cast<double>(schedule.whole_tiles) *
                                 (static_cast<double>(slabs) * slab + cost.tile);
  if (schedule.tail_tiles == 0) return time;
  time += static_cast<double>(ceil_div(schedule.tail_tiles * slabs, schedule.tail_blocks)) * slab +
          cost.tile;
  if (schedule.pair_parts > 0) {
    // Other cuts take so much longer than their costs say.
    constexpr double kCuts = 1.2;
    return time - kCuts + cost.pair_part * (schedule.pair_parts / 2 - 1) +
           cost.pair_block * schedule.tail_blocks;
  }
  if (schedule.tail_blocks > schedule.tail_tiles) {
    const auto parts = static_cast<double>(ceil_div(schedule.tail_blocks, schedule.tail_tiles) - 1);
    time +=
        cost.cut + parts * cost.part + cost.block * (schedule.tail_blocks - schedule.tail_tiles);
    if (schedule.tail_blocks % schedule.tail_tiles != 0) {
      time += cost.uneven;
      // Blocks in different places of K share less of what they read: up to 15% where the power limits.
      constexpr std::int32_t kManyTokens = 128;
      constexpr double kShare = 1.03;
      if (problem.m > kManyTokens) time *= kShare;
    }
  }
  return time;
}

/// How many tiles of a kernel are left after whole waves, and how many units may share them.
struct Tail {
  std::int32_t left;
  std::int64_t most;
};

Tail tail_of(const GemmProblem& problem, std::int32_t index, const DeviceLimits& limits) {
  const std::int64_t slabs = ceil_div(problem.weight.chunks, kSlabChunks);
  const std::int32_t left = tile_plan(problem, index, limits, 1).schedule.tail_tiles;
  return {left, std::min<std::int64_t>(tile_units(instance_of(problem, index), limits),
                                       left * slabs / 2)};
}

// Blocks of a tile, where they are in pairs.
constexpr std::int32_t kPairParts[] = {2, 4, 6, 8};

// The cheapest plan of a tile kernel; shared_bytes tells whether there is one.
GemmPlan plan_tiles(const GemmProblem& problem, const DeviceLimits& limits, double& least) {
  const std::span<const Instance> all = instances(problem.x_type, problem.weight.code_bits);
  const std::int64_t slabs = ceil_div(problem.weight.chunks, kSlabChunks);
  GemmPlan best = no_plan();
  least = std::numeric_limits<double>::infinity();
  const auto consider = [&](const GemmPlan& plan, const Instance& kernel) {
    if (!fits(plan, limits)) return;
    const double cost = tile_cost(problem, kernel, plan);
    if (cost < least) {
      least = cost;
      best = plan;
    }
  };
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (all[i].kind != KernelKind::kTile) continue;
    const auto index = static_cast<std::int32_t>(i);
    const Tail tail = tail_of(problem, index, limits);
    sm80::each_share(tail.left, tail.most, [&](std::int32_t, std::int32_t units) {
      consider(tile_plan(problem, index, limits, units), all[i]);
    });
    // Where strips have up to 3 token tiles, they are quicker.
    constexpr std::int32_t kFewTokens = 24;
    for (const std::int32_t parts : kPairParts) {
      if (problem.m > kFewTokens && 2 * parts <= slabs)
        consider(tile_pairs_plan(problem, index, limits, parts), all[i]);
    }
  }
  return best;
}

// The parts of every tile, for all m: the time of a tile of 128 features by as many blocks as there are,
// and 6% more for each further part, which has to be handed over.
std::int32_t invariant_parts(const WeightView& w, const DeviceLimits& limits) {
  const std::int64_t tiles = ceil_div(w.n, 2 * sm80::Layout::kBlockFeatures);
  const std::int64_t slabs = ceil_div(w.chunks, kSlabChunks);
  constexpr std::int32_t kMostParts = 4;
  constexpr double kPart = 0.06;
  std::int32_t best = 1;
  double least = std::numeric_limits<double>::infinity();
  for (std::int32_t parts = 1; parts <= kMostParts && parts <= std::max<std::int64_t>(slabs / 2, 1);
       ++parts) {
    const double time = static_cast<double>(ceil_div(tiles * parts, limits.multiprocessors)) /
                        parts * (1 + kPart * (parts - 1));
    if (time < least) {
      least = time;
      best = parts;
    }
  }
  return best;
}

// Every tile is cut in the same way whatever m is, and wgmma adds up alike whatever its number of tokens.
GemmPlan plan_invariant_tiles(const GemmProblem& problem, const DeviceLimits& limits) {
  const std::span<const Instance> all = instances(problem.x_type, problem.weight.code_bits);
  const std::int64_t slabs = ceil_div(problem.weight.chunks, kSlabChunks);
  const std::int32_t parts = invariant_parts(problem.weight, limits);
  GemmPlan best = no_plan();
  double least = std::numeric_limits<double>::infinity();
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (all[i].kind != KernelKind::kTile) continue;
    const GemmPlan plan = cut_tile_plan(problem, static_cast<std::int32_t>(i), limits, parts);
    const std::int64_t tiles = tile_count(all[i], problem);
    const std::int32_t units = plan.blocks / all[i].cluster_blocks;
    const TileCost& cost = all[i].cost;
    const double hand_over = parts > 1 ? cost.cut + cost.part * (parts - 1) : 0;
    const double time = cost.start + static_cast<double>(ceil_div(tiles * parts, units)) *
                                         (static_cast<double>(ceil_div(slabs, parts)) * cost.slab *
                                              short_groups(problem, all[i]) +
                                          cost.tile + hand_over);
    if (fits(plan, limits) && time < least) {
      least = time;
      best = plan;
    }
  }
  return best;
}

}  // namespace

GemmPlan plan(const GemmProblem& problem, const DeviceLimits& limits, BatchInvariance invariance) {
  const WeightView& w = problem.weight;
  // Groups of any rows are for the kernels of sm80.
  if (w.step_shift < 0) return sm80::plan(problem, limits, invariance);
  if (invariance == BatchInvariance::kRequired) {
    if (has_tiles(w, problem.x_type) && problem.m > 0) {
      const GemmPlan plan = plan_invariant_tiles(problem, limits);
      if (fits(plan, limits)) return plan;
    }
    return sm80::plan(problem, limits, invariance);
  }
  const auto token_tiles = static_cast<std::int32_t>(ceil_div(std::max(problem.m, 1), 8));
  constexpr std::int32_t kFewTokenTiles = 2;  // for which tiles do not stand in for strips
  PricedPlan best{no_plan()};
  if (token_tiles <=
      (has_tiles(w, problem.x_type) ? StripPlanner::kMostTokenTiles : kFewTokenTiles)) {
    best = StripPlanner(problem, token_tiles, limits).plan();
  } else if (!w.scales_divide) {
    // A slice of x after the other.
    best = StripPlanner(problem, kFewTokenTiles, limits).plan();
  }
  const bool has_strips = fits(best.plan, limits);
  // Which of both is quicker for 2 token tiles is known for 4 bits.
  const bool strips_only = token_tiles == 1 || (token_tiles == kFewTokenTiles && w.code_bits == 8);
  if (has_tiles(w, problem.x_type) && !strips_only &&
      (has_strips || token_tiles > kFewTokenTiles)) {
    double cost = 0;
    const GemmPlan tiles = plan_tiles(problem, limits, cost);
    if (!has_strips || best.cost >= cost) best.plan = tiles;
  }
  return fits(best.plan, limits) ? best.plan : sm80::plan(problem, limits, invariance);
}

namespace {

void add_strips(const GemmProblem& problem, const Instance& kernel, Schedule schedule,
                const DeviceLimits& limits, std::vector<Schedule>& all) {
  constexpr std::int32_t kMostStages = 5;
  const WeightView& w = problem.weight;
  const auto add = [&](std::int32_t room) {
    const bool known = std::find(all.begin(), all.end(), schedule) != all.end();
    if (!known && plan_as(problem, limits, schedule).shared_bytes <= room) all.push_back(schedule);
  };
  for (std::int32_t together = 1; together <= kernel.blocks_together; ++together) {
    const std::int32_t blocks = together * limits.multiprocessors;
    const std::int32_t room = limits.multiprocessor_shared_bytes / together - sm80::kReservedShared;
    for (schedule.cluster_blocks = 1; schedule.cluster_blocks <= 2; ++schedule.cluster_blocks) {
      // Some multiprocessors would have nothing to do.
      if (2 * halves_of(w) < blocks / schedule.cluster_blocks) continue;
      for (const StripDivision& division : {divide_strips(w, blocks, schedule.cluster_blocks),
                                            spread_strips(w, blocks, schedule.cluster_blocks)}) {
        schedule.clusters = division.clusters;
        schedule.share_halves = division.share_halves;
        for (schedule.stages = 1; schedule.stages <= kMostStages; ++schedule.stages) {
          for (const std::int32_t early : {1, schedule.stages}) {
            schedule.early_stages = early;
            add(room);
          }
        }
      }
    }
  }
}

void add_tiles(const GemmProblem& problem, const Instance& kernel, std::int32_t index,
               Schedule schedule, const DeviceLimits& limits, std::vector<Schedule>& all) {
  // Many rows of zeros beside x, or codes that are decoded many times over.
  constexpr std::int32_t kFewTokens = 32;
  constexpr std::int32_t kManyTokens = 96;
  const std::int64_t padded = ceil_div(problem.m, kernel.tokens) * kernel.tokens;
  if (padded >= problem.m + 64 ||
      (kernel.tokens > kFewTokens && 2 * padded > 3 * std::int64_t{problem.m}) ||
      problem.m > (kernel.tokens < kManyTokens ? 4 : 64) * kernel.tokens)
    return;
  const auto add = [&](std::int32_t share, bool in_pairs) {
    schedule.share = share;
    schedule.in_pairs = in_pairs;
    if (fits(plan_as(problem, limits, schedule), limits)) all.push_back(schedule);
  };
  const Tail tail = tail_of(problem, index, limits);
  sm80::each_share(tail.left, tail.most,
                   [&](std::int32_t share, std::int32_t) { add(share, false); });
  const std::int64_t slabs = ceil_div(problem.weight.chunks, kSlabChunks);
  for (const std::int32_t parts : kPairParts) {
    if (2 * parts <= slabs) add(parts, true);
  }
}

std::int32_t features_of(const Instance& kernel) {
  return kernel.kind == KernelKind::kTile ? kernel.blocks * sm80::Layout::kBlockFeatures : 0;
}

}  // namespace

std::vector<Schedule> schedules(const GemmProblem& problem, const DeviceLimits& limits) {
  std::vector<Schedule> all;
  const WeightView& w = problem.weight;
  const std::span<const Instance> kernels = instances(problem.x_type, w.code_bits);
  for (std::size_t i = 0; i < kernels.size() && w.step_shift >= 0; ++i) {
    const Instance& kernel = kernels[i];
    const auto index = static_cast<std::int32_t>(i);
    const Schedule schedule{.kernels = kKernels.name,
                            .kind = kernel.kind,
                            .features = features_of(kernel),
                            .tokens = kernel.tokens,
                            .warps = kernel.warps,
                            .cluster_blocks = kernel.cluster_blocks,
                            .streams_x = kernel.kind == KernelKind::kStrip && kernel.streams_x};
    if (kernel.kind == KernelKind::kTile) {
      if (has_tiles(w, problem.x_type)) add_tiles(problem, kernel, index, schedule, limits, all);
    } else if (problem.m <= kernel.tokens && problem.m > kernel.tokens - 8) {
      add_strips(problem, kernel, schedule, limits, all);
    }
  }
  return all.empty() ? sm80::schedules(problem, limits) : all;
}

GemmPlan plan_as(const GemmProblem& problem, const DeviceLimits& limits, const Schedule& schedule) {
  if (schedule.kernels != kKernels.name) return sm80::plan_as(problem, limits, schedule);
  const std::span<const Instance> kernels = instances(problem.x_type, problem.weight.code_bits);
  const bool strips = schedule.kind == KernelKind::kStrip;
  const auto found = std::find_if(kernels.begin(), kernels.end(), [&](const Instance& kernel) {
    return kernel.kind == schedule.kind && kernel.tokens == schedule.tokens &&
           kernel.warps == schedule.warps &&
           (strips ? kernel.streams_x == schedule.streams_x
                   : features_of(kernel) == schedule.features &&
                         kernel.cluster_blocks == schedule.cluster_blocks);
  });
  if (found == kernels.end()) return no_plan();
  const auto index = static_cast<std::int32_t>(found - kernels.begin());
  if (!strips) {
    if (schedule.in_pairs) return tile_pairs_plan(problem, index, limits, schedule.share);
    const Tail tail = tail_of(problem, index, limits);
    return tile_plan(problem, index, limits,
                     sm80::blocks_of_share(schedule.share, tail.left, tail.most));
  }
  GemmPlan plan = strip_plan(problem, index,
                             {.clusters = schedule.clusters,
                              .cluster_blocks = schedule.cluster_blocks,
                              .share_halves = schedule.share_halves,
                              .stages = schedule.stages,
                              .early_stages = schedule.early_stages});
  const std::int64_t busiest = ceil_div(halves_of(problem.weight), schedule.clusters);
  const bool is_whole = plan.blocks == limits.multiprocessors &&
                        rings_of(problem.weight, busiest, schedule.cluster_blocks) <= kRingsOfWhole;
  if (!is_whole) keep_apart(plan, limits);
  return plan;
}

void launch(const GemmProblem& problem, const GemmPlan& plan, const SplitScratch& scratch,
            void* stream) {
  if (plan.instance < kFirstInstance) {
    sm80::launch(problem, plan, scratch, stream);
    return;
  }
  const Instance& kernel = instance_of(problem, plan.instance - kFirstInstance);
  sm80::launch_slices(kernel, problem, plan, scratch, stream);
}

namespace {

void scratch_need(const DeviceLimits& limits, std::int64_t& partial_floats, std::int32_t& flags) {
  // A block leaves one part at most, and has one flag.
  const ExpertKernels& experts = expert_kernels(FloatType::kF16, 4);
  flags = limits.multiprocessors * experts.strips.blocks_together;
  std::int32_t most = 0;  // packed blocks x tokens of a tile
  for (const Instance& instance : instances(FloatType::kF16, 4)) {
    if (instance.kind == KernelKind::kTile)
      most = std::max(most, instance.blocks * instance.tokens);
  }
  for (const ExpertInstance& instance : experts.tiles)
    most = std::max(most, instance.blocks * instance.tokens);
  most = std::max(most, experts.strips.blocks_together * experts.strips.tokens);
  partial_floats = std::int64_t{limits.multiprocessors} * most * sm80::Layout::kBlockFeatures;
}

}  // namespace

constexpr std::string_view kMeasured =
#include "cuda/arch/sm90/schedules.inc"
    ;

// The packed order is that of sm80.
constinit const ArchKernels kKernels = {.name = "sm90",
                                        .priority = 90,
                                        .min_capability = 90,
                                        .max_capability = 90,
                                        .requirement = "compute capability 9.0",
                                        .pack = sm80::load,
                                        .plan = plan,
                                        .schedules = schedules,
                                        .plan_as = plan_as,
                                        .measured = kMeasured,
                                        .scratch_need = scratch_need,
                                        .launch = launch,
                                        .plan_experts = plan_experts,
                                        .launch_experts = launch_experts,
                                        .most_dispatches = sm80::kMostDispatches,
                                        .tile_rows = tile_rows,
                                        .most_sorted_ids = most_sorted_ids};

}  // namespace marlinq::cuda::sm90
