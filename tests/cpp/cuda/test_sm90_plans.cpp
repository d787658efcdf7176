// Plans of the sm90 kernels: pure host code, over layers and devices of all sizes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "core/integers.hpp"
#include "cuda/arch/sm80/plan.hpp"
#include "cuda/arch/sm90/experts.hpp"
#include "cuda/arch/sm90/launch.hpp"

namespace marlinq::cuda {
namespace {

constexpr std::int32_t kIrregular = -1;

DeviceLimits hopper(std::int32_t multiprocessors) {
  return {.multiprocessors = multiprocessors,
          .shared_bytes = 227 * 1024,
          .multiprocessor_shared_bytes = 228 * 1024,
          .capability = 90,
          .memory_rate = 4800};
}

GemmProblem problem_of(std::int32_t n, std::int32_t k, std::int32_t m, std::int32_t bits,
                       std::int32_t step_shift) {
  WeightView w;
  w.n = n;
  w.k = k;
  w.chunks = static_cast<std::int32_t>(ceil_div(k, 64));
  w.code_bits = bits;
  w.record_bytes = 48;
  w.has_zeros = true;
  w.step_shift = step_shift;
  w.chunk_shift = std::max(step_shift - 2, -1);
  w.num_groups =
      step_shift < 0
          ? w.chunks
          : static_cast<std::int32_t>(ceil_div(w.chunks * 4, std::int64_t{1} << step_shift));
  w.groups_per_chunk = step_shift == 0 ? 4 : step_shift == 1 ? 2 : 1;
  return {.weight = w, .x_stride = k, .x_columns = k, .y_stride = n, .m = m};
}

bool is_of_sm80(const GemmPlan& plan) {
  return plan.instance < static_cast<std::int32_t>(sm80::kInstanceCount);
}

const sm90::Instance& instance_of(const GemmProblem& problem, const GemmPlan& plan) {
  return sm90::instances(
      problem.x_type,
      problem.weight.code_bits)[static_cast<std::size_t>(plan.instance) - sm80::kInstanceCount];
}

// A plan fits, has no block that would wait for another to end, and covers the product once.
void check(const GemmProblem& problem, const DeviceLimits& limits) {
  const GemmPlan plan = sm90::plan(problem, limits, BatchInvariance::kNotRequired);
  ASSERT_GE(plan.blocks, 1);
  ASSERT_LE(plan.shared_bytes, limits.shared_bytes);
  if (is_of_sm80(plan)) return;
  const WeightView& w = problem.weight;
  const sm90::Instance& kernel = instance_of(problem, plan);
  ASSERT_GE(plan.stages, 2);
  ASSERT_GE(w.step_shift, 0);
  const std::int32_t together = plan.blocks > limits.multiprocessors ? 2 : 1;
  ASSERT_LE(together, kernel.blocks_together);
  ASSERT_LE(plan.blocks, together * limits.multiprocessors);
  ASSERT_LE(together * (plan.shared_bytes + 1024), limits.multiprocessor_shared_bytes);
  if (plan.kind == KernelKind::kStrip) {
    ASSERT_EQ(plan.blocks % plan.cluster_blocks, 0);
    ASSERT_LE(plan.early_stages, plan.stages);
    ASSERT_TRUE(problem.m <= kernel.tokens || !w.scales_divide);
    return;
  }
  ASSERT_TRUE(w.scales_divide);
  const TileSchedule& schedule = plan.schedule;
  if (schedule.pair_parts > 0) {
    ASSERT_TRUE(kernel.may_share_tile);
    ASSERT_EQ(plan.cluster_blocks, 2);
    ASSERT_EQ(schedule.pair_parts % 2, 0);
    ASSERT_EQ(schedule.whole_tiles, 0);
    ASSERT_EQ(schedule.tail_blocks, schedule.tail_tiles * schedule.pair_parts);
  } else {
    ASSERT_EQ(plan.cluster_blocks, kernel.cluster_blocks);
  }
  ASSERT_EQ(plan.blocks % plan.cluster_blocks, 0);
  const std::int32_t units = limits.multiprocessors / kernel.cluster_blocks;
  const std::int64_t tiles = ceil_div(w.n, kernel.cluster_blocks * kernel.blocks * 64) *
                             ceil_div(problem.m, kernel.tokens);
  ASSERT_EQ(std::int64_t{schedule.whole_tiles} * units + schedule.tail_tiles, tiles);
  ASSERT_EQ(plan.blocks / kernel.cluster_blocks,
            schedule.whole_tiles > 0 ? units : schedule.tail_blocks);
  ASSERT_LE(schedule.tail_blocks, units);
  ASSERT_GE(schedule.tail_blocks, schedule.tail_tiles);
  // A run of at least one slab for each block.
  ASSERT_LE(schedule.tail_blocks, schedule.tail_tiles * ceil_div(w.chunks, 2));
}

TEST(Sm90PlanTest, FitsAndCovers) {
  for (const std::int32_t multiprocessors : {132, 114, 78}) {
    const DeviceLimits limits = hopper(multiprocessors);
    for (const std::int32_t bits : {4, 8}) {
      for (const std::int32_t step_shift : {kIrregular, 0, 1, 2, 3, 5, 26}) {
        for (const std::int32_t n : {1, 33, 64, 100, 1000, 1408, 4096, 6144, 10240, 57344}) {
          for (const std::int32_t k : {1, 60, 192, 704, 1024, 4096, 8192, 28672, 200000}) {
            for (const std::int32_t m : {1, 3, 8, 9, 16, 17, 24, 25, 32, 33, 64, 100, 257, 8192}) {
              for (const bool divides : {true, false}) {
                GemmProblem problem = problem_of(n, k, m, bits, step_shift);
                problem.weight.scales_divide = divides;
                check(problem, limits);
                ASSERT_FALSE(HasFatalFailure())
                    << multiprocessors << " multiprocessors, bits " << bits << ", shift "
                    << step_shift << ", " << n << " x " << k << ", m " << m << ", " << divides;
              }
            }
          }
        }
      }
    }
  }
}

// What tiles multiply codes by is float16 and not too large; sums are multiplied by anything.
TEST(Sm90PlanTest, ScalesOfShortGroupsAreSmallWhereCodesAreMultipliedByThem) {
  constexpr std::int32_t kGroups32 = 1;
  constexpr std::int32_t kGroups64 = 2;
  constexpr std::int32_t kGroups128 = 3;
  const DeviceLimits limits = hopper(132);
  for (const std::int32_t shift : {kGroups32, kGroups64, kGroups128}) {
    for (const FloatType x_type : {FloatType::kF16, FloatType::kBF16}) {
      for (const FloatType scale_type : {FloatType::kF16, FloatType::kBF16, FloatType::kF32}) {
        for (const bool small : {true, false}) {
          GemmProblem problem = problem_of(4096, 4096, 256, 4, shift);
          problem.x_type = x_type;
          problem.weight.scale_type = scale_type;
          problem.weight.small_scales = small;
          const bool any = shift == kGroups128 || x_type == FloatType::kBF16;
          for (const auto invariance :
               {BatchInvariance::kNotRequired, BatchInvariance::kRequired}) {
            EXPECT_EQ(is_of_sm80(sm90::plan(problem, limits, invariance)),
                      !any && !(small && scale_type == FloatType::kF16))
                << shift << ", scales " << static_cast<int>(scale_type) << ", small " << small;
          }
        }
      }
    }
  }
}

TEST(Sm90PlanTest, FewRowsOfLargeLayersHaveTwoBlocksOnAMultiprocessorOrOneOfManyFeatures) {
  constexpr std::int32_t kGroups128 = 3;
  const DeviceLimits limits = hopper(132);
  const auto plan_of = [&](std::int32_t n, std::int32_t k, std::int32_t m, std::int32_t bits) {
    return sm90::plan(problem_of(n, k, m, bits, kGroups128), limits, BatchInvariance::kNotRequired);
  };
  for (const std::int32_t m : {1, 2, 3, 8}) {
    for (const auto& [n, k] : {std::pair{24576, 4096}, {10240, 8192}, {8192, 28672}}) {
      const GemmPlan plan = plan_of(n, k, m, 4);
      EXPECT_EQ(plan.kind, KernelKind::kStrip);
      EXPECT_GT(plan.blocks, limits.multiprocessors) << n << " x " << k << ", m " << m;
      EXPECT_LE(plan_of(n, k, m, 8).blocks, limits.multiprocessors)
          << n << " x " << k << ", m " << m;
    }
    // Of many features each, one block: of whole packed blocks where K is cut for that or not, or of halves.
    for (const auto& [n, k, cluster, halves] :
         {std::tuple{28672, 4096, 2, 2}, {57344, 8192, 1, 2}, {51200, 5120, 2, 1}}) {
      const GemmPlan plan = plan_of(n, k, m, 4);
      EXPECT_EQ(plan.kind, KernelKind::kStrip);
      EXPECT_LE(plan.blocks, limits.multiprocessors) << n << " x " << k << ", m " << m;
      EXPECT_EQ(plan.cluster_blocks, cluster) << n << " x " << k << ", m " << m;
      EXPECT_EQ(plan.share_halves, halves) << n << " x " << k << ", m " << m;
      EXPECT_EQ(plan_of(n, k, m, 8).cluster_blocks, 2) << n << " x " << k << ", m " << m;
    }
    // A block of this kernel and one of the next, on each.
    const GemmPlan small = plan_of(4096, 4096, m, 4);
    EXPECT_EQ(small.blocks, limits.multiprocessors);
    EXPECT_LE(2 * (small.shared_bytes + 1024), limits.multiprocessor_shared_bytes);
  }
  EXPECT_LE(plan_of(57344, 8192, 16, 4).blocks, limits.multiprocessors);
}

TEST(Sm90PlanTest, SlowMemoryTakesOneBlockWithLongRings) {
  constexpr std::int32_t kGroups128 = 3;
  DeviceLimits limits = hopper(132);
  limits.memory_rate = 3350;
  for (const std::int32_t m : {1, 2, 8}) {
    for (const auto& [n, k] : {std::pair{28672, 4096}, {57344, 8192}, {8192, 28672}}) {
      const GemmPlan plan =
          sm90::plan(problem_of(n, k, m, 4, kGroups128), limits, BatchInvariance::kNotRequired);
      EXPECT_EQ(plan.kind, KernelKind::kStrip);
      EXPECT_LE(plan.blocks, limits.multiprocessors) << n << " x " << k << ", m " << m;
      EXPECT_GE(plan.stages, 3) << n << " x " << k << ", m " << m;
    }
  }
}

// Two blocks of one kernel on a multiprocessor leave another without any.
TEST(Sm90PlanTest, BlocksForOneMultiprocessorEachDoNotMeet) {
  constexpr std::int32_t kGroups128 = 3;
  for (const std::int32_t rate : {3350, 4800}) {
    DeviceLimits limits = hopper(132);
    limits.memory_rate = rate;
    for (const auto& [n, k] :
         {std::pair{4096, 14336}, {4224, 12288}, {5120, 25600}, {4096, 8192}}) {
      for (const std::int32_t m : {1, 2, 8}) {
        const GemmProblem problem = problem_of(n, k, m, 4, kGroups128);
        std::vector<GemmPlan> plans = {sm90::plan(problem, limits, BatchInvariance::kNotRequired)};
        for (const Schedule& schedule : sm90::schedules(problem, limits))
          plans.push_back(sm90::plan_as(problem, limits, schedule));
        for (const GemmPlan& plan : plans) {
          if (plan.kind != KernelKind::kStrip || plan.blocks > limits.multiprocessors) continue;
          EXPECT_GT(2 * (plan.shared_bytes + sm80::kReservedShared),
                    limits.multiprocessor_shared_bytes)
              << n << " x " << k << ", m " << m << ", " << plan.blocks << " blocks";
        }
      }
    }
  }
}

TEST(Sm90PlanTest, SharesFewTilesInPairs) {
  constexpr std::int32_t kGroups128 = 3;
  const DeviceLimits limits = hopper(132);
  const auto parts = [&](std::int32_t n, std::int32_t k, std::int32_t m,
                         BatchInvariance invariance) {
    return sm90::plan(problem_of(n, k, m, 4, kGroups128), limits, invariance).schedule.pair_parts;
  };
  for (const std::int32_t m : {96, 192, 256}) {
    EXPECT_GT(parts(4096, 4096, m, BatchInvariance::kNotRequired), 0) << m;
    // There, what a tile's sums are must not depend on m.
    EXPECT_EQ(parts(4096, 4096, m, BatchInvariance::kRequired), 0) << m;
  }
  for (const std::int32_t m : {1, 16, 24}) {
    EXPECT_EQ(parts(4096, 4096, m, BatchInvariance::kNotRequired), 0) << m;
  }
  EXPECT_EQ(parts(57344, 8192, 64, BatchInvariance::kNotRequired), 0);
}

TEST(Sm90PlanTest, CutsTilesOfInvariantLayersInOneWay) {
  constexpr std::int32_t kGroups64 = 2;
  for (const std::int32_t multiprocessors : {132, 114, 78}) {
    const DeviceLimits limits = hopper(multiprocessors);
    for (const std::int32_t bits : {4, 8}) {
      for (const std::int32_t n : {1, 100, 1408, 4096, 6144, 28672}) {
        for (const std::int32_t k : {60, 192, 704, 4096, 28672}) {
          std::int32_t parts = 0;  // for m of 1
          for (const std::int32_t m : {1, 8, 33, 64, 100, 257, 8192}) {
            const GemmProblem problem = problem_of(n, k, m, bits, kGroups64);
            const GemmPlan plan = sm90::plan(problem, limits, BatchInvariance::kRequired);
            ASSERT_FALSE(is_of_sm80(plan));
            ASSERT_EQ(plan.kind, KernelKind::kTile);
            ASSERT_LE(plan.shared_bytes, limits.shared_bytes);
            const TileSchedule& schedule = plan.schedule;
            ASSERT_GE(schedule.parts, 1);
            ASSERT_LE(schedule.parts, ceil_div(problem.weight.chunks, 2));
            ASSERT_EQ(schedule.whole_tiles + schedule.tail_tiles, 0);
            ASSERT_GE(plan.blocks, 1);
            ASSERT_LE(plan.blocks, limits.multiprocessors);
            ASSERT_EQ(plan.blocks % (plan.cluster_blocks * schedule.parts), 0);
            if (m == 1) parts = schedule.parts;
            ASSERT_EQ(schedule.parts, parts) << n << " x " << k << ", m " << m;
          }
        }
      }
    }
  }
}

TEST(Sm90PlanTest, TakesTheKernelsOfSm80WhereItHasNone) {
  const DeviceLimits limits = hopper(132);
  constexpr std::int32_t kGroups128 = 3;
  constexpr std::int32_t kGroups32 = 1;
  constexpr std::int32_t kGroups16 = 0;
  const auto is_older = [&](const GemmProblem& problem, BatchInvariance invariance) {
    return is_of_sm80(sm90::plan(problem, limits, invariance));
  };
  for (const std::int32_t m : {1, 16, 24, 64, 512}) {
    const GemmProblem problem = problem_of(4096, 4096, m, 4, kGroups128);
    EXPECT_FALSE(is_older(problem, BatchInvariance::kNotRequired)) << m;
    EXPECT_FALSE(is_older(problem, BatchInvariance::kRequired)) << m;
    for (const auto invariance : {BatchInvariance::kNotRequired, BatchInvariance::kRequired})
      EXPECT_FALSE(is_older(problem_of(4096, 4096, m, 4, kGroups32), invariance)) << m;
    EXPECT_TRUE(is_older(problem_of(4096, 4096, m, 4, kGroups16), BatchInvariance::kRequired)) << m;
    EXPECT_TRUE(is_older(problem_of(4096, 4096, m, 4, kIrregular), BatchInvariance::kNotRequired))
        << m;
  }
  // Too few items for the warps of a block.
  EXPECT_TRUE(is_older(problem_of(4096, 1024, 1, 4, kGroups128), BatchInvariance::kNotRequired));
}

/// Through the lists of moe_align_block_size; so many ids that experts have a quarter of a tile of rows on average.
ExpertProblem experts_of(std::int32_t n, std::int32_t k, std::int32_t tile_rows, std::int32_t bits,
                         std::int32_t step_shift) {
  constexpr std::int32_t kExperts = 128;
  ExpertProblem problem{.matrix = problem_of(n, k, 0, bits, step_shift), .num_experts = kExperts};
  problem.tiles.tile_rows = tile_rows;
  problem.tiles.num_ids = kExperts * tile_rows / 4;
  problem.tiles.most_tiles = 2 * kExperts;
  return problem;
}

bool is_of_sm80(const ExpertPlan& plan) {
  return plan.instance < static_cast<std::int32_t>(sm80::kExpertInstanceCount);
}

TEST(Sm90ExpertPlanTest, FitsAndHoldsATile) {
  for (const std::int32_t multiprocessors : {132, 78}) {
    const DeviceLimits limits = hopper(multiprocessors);
    for (const std::int32_t bits : {4, 8}) {
      for (const std::int32_t step_shift : {1, 2, 3, 5, 26}) {
        for (const std::int32_t n : {1, 100, 1536, 28672}) {
          for (const std::int32_t k : {1, 64, 704, 7168}) {
            for (const std::int32_t rows : {8, 16, 32, 64, 65, 128}) {
              const ExpertProblem problem = experts_of(n, k, rows, bits, step_shift);
              const ExpertPlan plan =
                  sm90::plan_experts(problem, limits, BatchInvariance::kNotRequired);
              ASSERT_FALSE(is_of_sm80(plan));
              ASSERT_LE(plan.shared_bytes, limits.shared_bytes);
              ASSERT_GE(plan.blocks, 1);
              ASSERT_GE(plan.tokens, rows);
              if (rows < 16) {
                // Two of its blocks fit on a multiprocessor.
                ASSERT_EQ(plan.instance, sm90::kExpertStrips);
                ASSERT_LE(plan.blocks, 2 * multiprocessors);
                ASSERT_LE(2 * (plan.shared_bytes + sm80::kReservedShared),
                          limits.multiprocessor_shared_bytes);
                ASSERT_GE(plan.warps, 4);
                continue;
              }
              ASSERT_NE(plan.instance, sm90::kExpertStrips);
              ASSERT_LE(plan.blocks, multiprocessors);
              ASSERT_GE(plan.stages, 2);
            }
          }
        }
      }
    }
  }
}

TEST(Sm90ExpertPlanTest, ChoosesByTheRowsOfAnExpertWhereTilesAreJoined) {
  const DeviceLimits limits = hopper(132);
  const auto tokens_of = [&](std::int32_t tile_rows, std::int32_t ids, std::int32_t most_tiles) {
    ExpertProblem problem = experts_of(1536, 2048, tile_rows, 4, 3);
    problem.tiles.num_ids = ids;
    problem.tiles.most_tiles = most_tiles;
    return sm90::plan_experts(problem, limits, BatchInvariance::kNotRequired).tokens;
  };
  for (const std::int32_t tile_rows : {8, 16, 64}) {
    const std::int32_t few = sm90::kMostJoinedTiles;
    EXPECT_EQ(tokens_of(tile_rows, 128 * 64, few), 80) << tile_rows;
    EXPECT_EQ(tokens_of(tile_rows, 128 * 200, few), 144) << tile_rows;
  }
  EXPECT_EQ(tokens_of(8, 128 * 6, 256), 8);
  EXPECT_EQ(tokens_of(8, 128 * 6 + 1, 256), 32);
  // So many tiles are not joined: the least kernel that holds one.
  EXPECT_EQ(tokens_of(8, 128 * 200, sm90::kMostJoinedTiles + 1), 32);
  EXPECT_EQ(tokens_of(64, 128 * 200, sm90::kMostJoinedTiles + 1), 80);
  // A whole expert in one tile, however few there are.
  ExpertProblem one = experts_of(1536, 2048, 8, 4, 3);
  one.num_experts = 1;
  one.tiles.num_ids = 8;
  EXPECT_EQ(sm90::plan_experts(one, limits, BatchInvariance::kNotRequired).tokens, 8);
}

TEST(Sm90ExpertPlanTest, TakesTheKernelsOfSm80WhereItHasNone) {
  const DeviceLimits limits = hopper(132);
  const auto is_older = [&](const ExpertProblem& problem, BatchInvariance invariance) {
    return is_of_sm80(sm90::plan_experts(problem, limits, invariance));
  };
  constexpr std::int32_t kGroups128 = 3;
  constexpr auto kAny = BatchInvariance::kNotRequired;
  ExpertProblem problem = experts_of(1536, 2048, 64, 4, kGroups128);
  EXPECT_FALSE(is_older(problem, kAny));
  EXPECT_TRUE(is_older(problem, BatchInvariance::kRequired));
  EXPECT_TRUE(is_older(experts_of(1536, 2048, 64, 4, kIrregular), kAny));
  EXPECT_FALSE(is_older(experts_of(1536, 2048, 64, 4, 1), kAny));
  EXPECT_TRUE(is_older(experts_of(1536, 2048, 64, 4, 0), kAny));
  problem.activates = true;
  EXPECT_FALSE(is_older(problem, kAny));
  // A packed block has features of both halves.
  problem.matrix.weight.n = 1472;
  EXPECT_TRUE(is_older(problem, kAny));
  problem.activates = false;
  problem.matrix.weight.scales_divide = false;
  EXPECT_TRUE(is_older(problem, kAny));
  problem = experts_of(1536, 2048, 64, 4, 1);
  problem.matrix.weight.small_scales = false;
  EXPECT_TRUE(is_older(problem, kAny));
  problem.matrix.x_type = FloatType::kBF16;
  EXPECT_FALSE(is_older(problem, kAny));
  // With a few rows groups have one length, and the product is not of a block.
  problem = experts_of(1536, 2048, 8, 4, kGroups128);
  problem.matrix.weight.scales_divide = false;
  EXPECT_FALSE(is_older(problem, kAny));
  EXPECT_TRUE(is_older(problem, BatchInvariance::kRequired));
  EXPECT_TRUE(is_older(experts_of(1536, 2048, 8, 4, kIrregular), kAny));
  problem.activates = true;
  EXPECT_TRUE(is_older(problem, kAny));
  problem.activates = false;
  problem.tiles.settled = true;
  EXPECT_FALSE(is_older(problem, kAny));
  problem.follows_product = true;  // the second product of a block
  EXPECT_TRUE(is_older(problem, kAny));
  problem.follows_product = false;
  problem.tiles.num_ids = 3 * problem.num_experts;
  EXPECT_FALSE(is_older(problem, kAny));
  ++problem.tiles.num_ids;
  EXPECT_TRUE(is_older(problem, kAny));
}

TEST(Sm90ExpertPlanTest, SlowMemoryTakesTheKernelsOfSm80ForManyTilesOfAFewRows) {
  DeviceLimits limits = hopper(132);
  ExpertProblem problem = experts_of(4096, 7168, 8, 4, 3);
  constexpr auto kAny = BatchInvariance::kNotRequired;
  for (const std::int32_t ids : {sm80::kMostSortedIds, sm80::kMostSortedIds + 1}) {
    problem.tiles.num_ids = ids;
    limits.memory_rate = 4800;
    EXPECT_FALSE(is_of_sm80(sm90::plan_experts(problem, limits, kAny))) << ids;
    limits.memory_rate = 3350;
    EXPECT_EQ(is_of_sm80(sm90::plan_experts(problem, limits, kAny)), ids > sm80::kMostSortedIds);
  }
}

TEST(Sm90ExpertPlanTest, StripsSortFewIds) {
  const DeviceLimits limits = hopper(132);
  ExpertProblem problem = experts_of(1536, 2048, 8, 4, 3);
  constexpr auto kAny = BatchInvariance::kNotRequired;
  EXPECT_EQ(sm90::most_sorted_ids(problem, limits, kAny), sm80::kMostSortedIds);
  EXPECT_EQ(sm90::most_sorted_ids(problem, limits, BatchInvariance::kRequired), 0);
  EXPECT_EQ(sm90::most_sorted_ids(experts_of(1536, 2048, 32, 4, 3), limits, kAny), 0);
}

TEST(Sm90ExpertPlanTest, TilesGrowWithTheRowsOfAnExpert) {
  const auto rows_of = [](std::int64_t tokens, BatchInvariance invariance) {
    return sm90::tile_rows(tokens, tokens * 8, 128, invariance);
  };
  std::int32_t before = 8;
  for (std::int64_t tokens = 1; tokens <= 8192; tokens *= 2) {
    const std::int32_t rows = rows_of(tokens, BatchInvariance::kNotRequired);
    EXPECT_GE(rows, before) << tokens;
    EXPECT_LE(rows, 144) << tokens;
    before = rows;
    EXPECT_EQ(rows_of(tokens, BatchInvariance::kRequired),
              sm80::tile_rows(tokens, tokens * 8, 128, BatchInvariance::kRequired));
  }
  EXPECT_EQ(before, 144);
}

TEST(Sm90ExpertPlanTest, TilesFillWithTheRowsOfAnExpert) {
  // 64 experts: one tile of 80, one of 144, two of 80, two of 144.
  for (const auto& [rows, expected] : {std::pair{64, 80}, {96, 144}, {150, 80}, {175, 144}}) {
    const std::int64_t ids = std::int64_t{rows} * 64;
    EXPECT_EQ(sm90::tile_rows(ids / 8, ids, 64, BatchInvariance::kNotRequired), expected) << rows;
  }
}

// Their group records are longer by half.
TEST(Sm80PlanTest, AsymmetricLayersHaveAsManyWarps) {
  constexpr std::int32_t kGroups128 = 3;
  GemmProblem problem = problem_of(57344, 8192, 16, 4, kGroups128);
  const GemmPlan asymmetric = sm80::plan(problem, hopper(132), BatchInvariance::kNotRequired);
  problem.weight.has_zeros = false;
  problem.weight.record_bytes = 32;
  const GemmPlan symmetric = sm80::plan(problem, hopper(132), BatchInvariance::kNotRequired);
  ASSERT_EQ(symmetric.kind, KernelKind::kStrip);
  EXPECT_EQ(symmetric.warps, 16);
  EXPECT_EQ(asymmetric.kind, KernelKind::kStrip);
  EXPECT_EQ(asymmetric.warps, 16);
}

TEST(Sm80PlanTest, CodesAreMultipliedByFloat16ScalesOfShortGroups) {
  const auto view = [](std::int32_t k, std::int32_t step_shift) {
    WeightView w = problem_of(1536, k, 64, 4, step_shift).weight;
    w.chunk_shift = step_shift >= 2 ? step_shift - 2 : -1;
    return w;
  };
  WeightView w = view(2048, 1);
  EXPECT_TRUE(sm80::has_short_groups(w));
  EXPECT_TRUE(sm80::has_even_short_groups(w));
  w.small_scales = false;
  EXPECT_FALSE(sm80::has_short_groups(w));
  EXPECT_TRUE(sm80::has_even_short_groups(w));
  w = view(2048, 1);
  w.scale_type = FloatType::kBF16;
  EXPECT_FALSE(sm80::has_short_groups(w));
  EXPECT_FALSE(sm80::has_short_groups(view(2048, 2)));
  EXPECT_FALSE(sm80::has_even_short_groups(view(2048, 2)));
  EXPECT_FALSE(sm80::has_even_short_groups(view(2048, kIrregular)));
  // A rounding of each weight does not average out over few rows.
  EXPECT_TRUE(sm80::has_short_groups(view(256, 1)));
  EXPECT_FALSE(sm80::has_short_groups(view(192, 1)));
}

TEST(Sm80ExpertPlanTest, LongRunsTakeStripsWhereGroupsAreEven) {
  const DeviceLimits limits = hopper(132);
  const auto instance_of = [&](std::int32_t step_shift, std::int32_t chunk_shift,
                               std::int32_t rows = 8) {
    ExpertProblem problem = experts_of(4096, 7168, rows, 4, step_shift);
    problem.matrix.weight.chunk_shift = chunk_shift;
    problem.matrix.weight.scales_divide = rows == 8;
    return sm80::plan_experts(problem, limits, BatchInvariance::kNotRequired).instance;
  };
  constexpr std::int32_t kStrips = 0;
  EXPECT_EQ(instance_of(3, 1), kStrips);
  EXPECT_EQ(instance_of(1, -1), kStrips);
  EXPECT_NE(instance_of(kIrregular, -1), kStrips);
  // A list of more rows would have its weights read again for each 8 of them.
  EXPECT_NE(instance_of(3, 1, 16), kStrips);
}

TEST(Sm80ExpertPlanTest, CutsStripsThatAreFewOrLong) {
  const DeviceLimits limits = hopper(132);
  const auto cuts = [&](std::int32_t k, std::int32_t tiles, BatchInvariance invariance) {
    ExpertProblem problem = experts_of(2048, k, 8, 4, 3);
    problem.tiles.most_tiles = problem.tiles.num_ids = tiles;
    return sm80::plan_experts_with(0, problem, limits, invariance).may_cut;
  };
  constexpr auto kAny = BatchInvariance::kNotRequired;
  EXPECT_FALSE(cuts(2048, 64, kAny));
  EXPECT_TRUE(cuts(2048, 4, kAny));
  EXPECT_TRUE(cuts(4096, 64, kAny));
  EXPECT_FALSE(cuts(4096, 64, BatchInvariance::kRequired));
}

}  // namespace
}  // namespace marlinq::cuda
