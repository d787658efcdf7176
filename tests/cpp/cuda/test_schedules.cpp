// Schedules of layers: which there are, their plans, and which of them a layer takes.
#include <gtest/gtest.h>

#include <cstdint>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "core/integers.hpp"
#include "cuda/arch/sm80/plan.hpp"
#include "cuda/arch_table.hpp"
#include "cuda/schedule_table.hpp"
#include "support/compare.hpp"

namespace marlinq::cuda {
namespace {

using test::expect_error;

constexpr std::int32_t kGroups128 = 3;
constexpr std::int32_t kGroups32 = 1;

DeviceLimits limits_of(std::int32_t capability) {
  if (capability == 90) {
    return {.multiprocessors = 132,
            .shared_bytes = 227 * 1024,
            .multiprocessor_shared_bytes = 228 * 1024,
            .capability = 90,
            .memory_rate = 3350};
  }
  return {.multiprocessors = 84,
          .shared_bytes = 99 * 1024,
          .multiprocessor_shared_bytes = 100 * 1024,
          .capability = capability,
          .memory_rate = 700};
}

WeightView weight_of(std::int32_t n, std::int32_t k, std::int32_t step_shift = kGroups128) {
  WeightView w;
  w.n = n;
  w.k = k;
  w.chunks = static_cast<std::int32_t>(ceil_div(k, 64));
  w.record_bytes = 32;
  w.step_shift = step_shift;
  w.chunk_shift = step_shift - 2;
  w.num_groups = static_cast<std::int32_t>(ceil_div(w.chunks * 4, std::int64_t{1} << step_shift));
  w.groups_per_chunk = step_shift == kGroups32 ? 2 : 1;
  return w;
}

/// An architecture, and a device that it is for.
struct On {
  const ArchKernels& arch;
  DeviceLimits limits;
};

std::vector<On> everywhere() {
  std::vector<On> all;
  for (const ArchKernels* arch : arch_kernels())
    for (const std::int32_t capability : {80, 89, 90})
      if (arch->runs_on(capability)) all.push_back({*arch, limits_of(capability)});
  return all;
}

TEST(ScheduleTest, EachHasAPlanThatFitsAlsoForFewerRows) {
  for (const auto& [arch, limits] : everywhere()) {
    for (const std::int32_t step_shift : {kGroups128, kGroups32}) {
      for (const std::int32_t n : {64, 1000, 4096, 57344}) {
        for (const std::int32_t k : {64, 704, 4096, 28672}) {
          const WeightView w = weight_of(n, k, step_shift);
          for (const std::int32_t m : {1, 8, 16, 24, 64, 96, 257, 512}) {
            for (const Schedule& schedule : arch.schedules(problem_without_data(w, m), limits)) {
              // Those that a tuner would let this one stand for.
              for (const std::int32_t rows : {m, m - 3, m - 63}) {
                if (rows < 1) continue;
                const GemmPlan plan = arch.plan_as(problem_without_data(w, rows), limits, schedule);
                ASSERT_LE(plan.shared_bytes, limits.shared_bytes)
                    << arch.name << ", " << n << " x " << k << ", m " << rows << " as of " << m
                    << ": " << to_string(schedule);
                ASSERT_GE(plan.blocks, 1);
                ASSERT_TRUE(plan.kind == KernelKind::kTile || rows <= plan.tokens);
                ASSERT_EQ(plan.blocks % plan.cluster_blocks, 0);
                ASSERT_GE(plan.schedule.tail_blocks, plan.schedule.tail_tiles);
                ASSERT_EQ(plan.dependent_launch, limits.capability >= 90);
              }
            }
          }
        }
      }
    }
  }
}

TEST(ScheduleTest, EachIsDifferentAndComesBackFromItsText) {
  for (const auto& [arch, limits] : everywhere()) {
    for (const std::int32_t m : {1, 4, 16, 64, 128, 512}) {
      std::set<std::string> texts;
      const auto all = arch.schedules(problem_without_data(weight_of(4096, 4096), m), limits);
      EXPECT_GE(all.size(), 2u) << arch.name << ", m " << m;
      for (const Schedule& schedule : all) {
        const std::string text = to_string(schedule);
        EXPECT_TRUE(texts.insert(text).second) << text;
        EXPECT_EQ(parse_schedule(text), schedule) << text;
      }
    }
  }
}

TEST(ScheduleTest, TheEstimateIsAmongThem) {
  for (const auto& [arch, limits] : everywhere()) {
    for (const std::int32_t n : {4096, 28672}) {
      for (const std::int32_t m : {48, 64, 96, 128, 200, 256, 512}) {
        const GemmProblem problem = problem_without_data(weight_of(n, 4096), m);
        const GemmPlan plan = arch.plan(problem, limits, BatchInvariance::kNotRequired);
        bool found = false;
        for (const Schedule& schedule : arch.schedules(problem, limits))
          found = found || arch.plan_as(problem, limits, schedule) == plan;
        EXPECT_TRUE(found) << arch.name << ", " << n << ", m " << m;
      }
    }
  }
}

// Most kernels multiply sums by quotients of scales.
TEST(ScheduleTest, ScalesThatDoNotDivideHaveTheKernelsThatNeedNoQuotients) {
  for (const auto& [arch, limits] : everywhere()) {
    for (const std::int32_t step_shift : {kGroups128, kGroups32, -1}) {
      WeightView w = weight_of(4096, 4096, step_shift);
      w.scales_divide = false;
      const bool sm80_only = std::string_view(arch.name) == "sm80" || step_shift < 0;
      for (const std::int32_t m : {1, 8, 9, 16, 24, 64, 512}) {
        for (const Schedule& schedule : arch.schedules(problem_without_data(w, m), limits)) {
          EXPECT_EQ(schedule.kind, KernelKind::kStrip) << to_string(schedule);
          EXPECT_TRUE(!sm80_only || schedule.tokens == 8) << to_string(schedule);
          EXPECT_LE(m, schedule.tokens) << to_string(schedule);
        }
      }
    }
  }
}

TEST(ScheduleTest, RefusesOtherText) {
  for (const char* text :
       {"", "sm90", "sm90 tile features=128", "sm90 tiles features",
        "sm90 tiles features=", "sm90 tiles features=x", "sm90 tiles features=12 8",
        "sm90 tiles stages=2", "sm90 tiles  ", "sm90 strips share=1", "sm90 strips tokens=8x"}) {
    expect_error(ErrorCode::kInvalidArgument, {"schedules: '", text, "is no schedule"},
                 [&] { (void)parse_schedule(text); });
  }
}

class TableTest : public ::testing::Test {
 protected:
  ScheduleEntry entry(std::int64_t first, std::int64_t last, std::int32_t which = 0) const {
    ScheduleEntry result = layer_;
    result.first_rows = first;
    result.last_rows = last;
    const auto all =
        arch_.schedules(problem_without_data(view_, static_cast<std::int32_t>(last)), limits_);
    result.schedule = to_string(all.at(static_cast<std::size_t>(which)));
    return result;
  }
  static ScheduleEntry layer_of(ScheduleEntry entry) {
    entry.first_rows = entry.last_rows = 1;
    entry.schedule = {};
    return entry;
  }
  std::vector<RowsSchedule> of(const Schedules& entries) const {
    return schedules_of(entries, layer_, arch_, view_, limits_);
  }

  const ArchKernels& arch_ = choose_arch("sm80", 90);
  DeviceLimits limits_ = limits_of(90);
  WeightView view_ = weight_of(4096, 4096);
  ScheduleEntry layer_{.device = "A",
                       .kernel = "sm80",
                       .bits = 4,
                       .group_size = 128,
                       .n = 4096,
                       .k = 4096,
                       .schedule = {}};
};

TEST_F(TableTest, ALayerTakesTheEntriesThatAreForIt) {
  Schedules entries = {entry(33, 64, 1), entry(17, 24)};
  const auto differ = [&](auto&& change) {
    entries.push_back(entry(100, 128));
    change(entries.back());
  };
  differ([](ScheduleEntry& e) { e.device = "B"; });
  differ([](ScheduleEntry& e) { e.kernel = "sm90"; });
  differ([](ScheduleEntry& e) { e.bits = 8; });
  differ([](ScheduleEntry& e) { e.group_size = 64; });
  differ([](ScheduleEntry& e) { e.n = 4160; });
  differ([](ScheduleEntry& e) { e.k = 4160; });
  // What it says of another layer does not matter.
  entries.back().schedule = "nothing";
  const std::vector<RowsSchedule> taken = of(entries);
  ASSERT_EQ(taken.size(), 2u);
  EXPECT_EQ(taken[0].first_rows, 17);
  EXPECT_EQ(taken[0].last_rows, 24);
  EXPECT_EQ(taken[1].first_rows, 33);
  EXPECT_EQ(to_string(taken[1].schedule), entries[0].schedule);
}

TEST_F(TableTest, RowsWithoutOneAreRunAsEstimated) {
  const std::vector<RowsSchedule> taken = of({entry(17, 24, 1), entry(33, 64, 2)});
  for (const std::int32_t m : {1, 16, 17, 20, 24, 25, 32, 33, 64, 65, 8192}) {
    const GemmProblem problem = problem_without_data(view_, m);
    const bool first = m >= 17 && m <= 24;
    const bool second = m >= 33 && m <= 64;
    EXPECT_EQ(plan_rows(problem, taken, arch_, limits_, BatchInvariance::kNotRequired),
              first || second ? arch_.plan_as(problem, limits_, taken[first ? 0 : 1].schedule)
                              : arch_.plan(problem, limits_, BatchInvariance::kNotRequired))
        << m;
  }
}

TEST_F(TableTest, RefusesWhatTheKernelsDoNotHave) {
  ScheduleEntry wrong = entry(17, 32);
  wrong.schedule = "sm80 tiles features=128 tokens=40 warps=8 cluster=1 share=1";
  expect_error(ErrorCode::kInvalidArgument,
               {wrong.schedule, "4096x4096 and 32 rows", "sm80 has no such schedule", "tune"},
               [&] { of({wrong}); });
  // One of few tokens for more of them.
  wrong = entry(1, 8);
  wrong.last_rows = 17;
  expect_error(ErrorCode::kInvalidArgument, {"17 rows", "sm80 has no such schedule"},
               [&] { of({wrong}); });
}

TEST_F(TableTest, RefusesTwoForTheSameRows) {
  expect_error(ErrorCode::kInvalidArgument, {"two for 4096x4096 and 32 rows"},
               [&] { of({entry(32, 64), entry(17, 32)}); });
}

TEST_F(TableTest, KindsOfLayersAreKeptApart) {
  for (const ArchKernels* arch : arch_kernels()) {
    for (const ScheduleEntry& entry : measured_schedules(*arch)) {
      const ScheduleEntry layer = layer_of(entry);
      for (const std::int32_t bytes : {32, 48, 64}) {
        for (const std::int32_t shift : {kGroups128, -1}) {
          WeightView view =
              weight_of(static_cast<std::int32_t>(entry.n), static_cast<std::int32_t>(entry.k));
          view.record_bytes = bytes;
          view.has_zeros = bytes == 48;
          view.scale_type = bytes == 64 ? FloatType::kF32 : FloatType::kF16;
          view.step_shift = shift;
          const auto expected =
              schedules_of(measured_schedules(*arch), layer, *arch, view, limits_);
          for (int i = 0; i < 2; ++i) {
            const auto found = measured_schedules_of(layer, *arch, view, limits_);
            ASSERT_EQ(found.size(), expected.size()) << entry.n << "x" << entry.k;
            for (std::size_t j = 0; j < found.size(); ++j) {
              EXPECT_EQ(found[j].first_rows, expected[j].first_rows);
              EXPECT_EQ(found[j].last_rows, expected[j].last_rows);
              EXPECT_EQ(found[j].schedule, expected[j].schedule);
            }
          }
        }
      }
    }
  }
}

TEST_F(TableTest, ThoseThatComeWithTheLibraryAreKnownToIt) {
  for (const ArchKernels* arch : arch_kernels()) {
    for (const ScheduleEntry& entry : measured_schedules(*arch)) {
      const ScheduleEntry layer = layer_of(entry);
      WeightView view =
          weight_of(static_cast<std::int32_t>(entry.n), static_cast<std::int32_t>(entry.k));
      ASSERT_EQ(entry.group_size, 128);
      view.code_bits = entry.bits;
      EXPECT_EQ(schedules_of({&entry, 1}, layer, *arch, view, limits_).size(), 1u)
          << entry.n << "x" << entry.k << " " << entry.schedule;
      // Any layer of that shape can be loaded, and takes what it has room for.
      for (const std::int32_t bytes : {48, 64, 80}) {
        for (const std::int32_t shift : {kGroups128, -1}) {
          WeightView other = view;
          other.record_bytes = bytes;
          other.has_zeros = bytes % 32 != 0;
          other.scale_type = bytes >= 64 ? FloatType::kF32 : FloatType::kF16;
          other.step_shift = shift;
          other.scales_divide = bytes != 64;
          for (const RowsSchedule& rows : schedules_of({&entry, 1}, layer, *arch, other, limits_)) {
            for (const std::int32_t m : {rows.first_rows, rows.last_rows}) {
              EXPECT_LE(arch->plan_as(problem_without_data(other, m), limits_, rows.schedule)
                            .shared_bytes,
                        limits_.shared_bytes)
                  << entry.schedule;
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace marlinq::cuda
