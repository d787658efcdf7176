// The choice of an instruction set, for machines that this one is not too.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "cpu/dispatch.hpp"
#include "cpu/features.hpp"
#include "support/compare.hpp"
#include "support/cpu_kernels.hpp"

namespace marlinq {
namespace {

using cpu::choose_isa;
using cpu::isa_kernels;
using cpu::IsaKernels;
using test::expect_error;

constexpr std::uint32_t kEverything = ~0U;

TEST(DispatchTest, TableIsOrderedAndNamesAreDistinct) {
  ASSERT_FALSE(isa_kernels().empty());
  std::set<std::string> names;
  for (std::size_t i = 0; i < isa_kernels().size(); ++i) {
    const IsaKernels& isa = *isa_kernels()[i];
    EXPECT_TRUE(names.insert(isa.name).second) << isa.name;
    for (const Compute compute :
         {Compute::kFloat32, Compute::kInt16, Compute::kBFloat16, Compute::kInt8}) {
      EXPECT_NE(cpu::arithmetic_of(isa, compute).prepare, nullptr);
      EXPECT_NE(cpu::arithmetic_of(isa, compute).gemm, nullptr);
    }
    EXPECT_NE(isa.to_float, nullptr);
    EXPECT_NE(isa.from_float, nullptr);
    if (i > 0) {
      EXPECT_LT(isa.priority, isa_kernels()[i - 1]->priority);
    }
  }
}

TEST(DispatchTest, GenericNeedsNothing) {
  EXPECT_STREQ(choose_isa({}, 0).name, "generic");
  EXPECT_STREQ(choose_isa("generic", 0).name, "generic");
}

TEST(DispatchTest, TheBestUsableOneIsChosen) {
  // Every subset of the features that any kernel asks for.
  std::uint32_t asked = 0;
  for (const IsaKernels* isa : isa_kernels()) asked |= isa->required;
  for (std::uint32_t mask = 0; mask <= asked; ++mask) {
    const IsaKernels& chosen = choose_isa({}, mask);
    EXPECT_EQ(chosen.required & ~mask, 0U) << chosen.name << " on mask " << mask;
    for (const IsaKernels* isa : isa_kernels()) {
      if (isa->priority > chosen.priority) {
        EXPECT_NE(isa->required & ~mask, 0U)
            << isa->name << " was passed over for " << chosen.name << " on mask " << mask;
      }
    }
  }
}

TEST(DispatchTest, ANameWinsOverPriority) {
  for (const IsaKernels* isa : isa_kernels()) {
    EXPECT_EQ(&choose_isa(isa->name, kEverything), isa);
    EXPECT_EQ(&choose_isa(isa->name, isa->required), isa);
  }
}

TEST(DispatchTest, RefusesUnknownNames) {
  for (const char* name : {"avx3", "GENERIC", " ", "generic "}) {
    expect_error(ErrorCode::kInvalidArgument,
                 {"kernel: '" + std::string(name) + "'", "expected one of", "generic"},
                 [&] { choose_isa(name, kEverything); });
  }
}

TEST(DispatchTest, SaysWhatTheMachineLacks) {
  for (const IsaKernels* isa : isa_kernels()) {
    for (std::uint32_t bit = 1; bit != 0; bit <<= 1) {
      if ((isa->required & bit) == 0) continue;
      expect_error(ErrorCode::kUnsupported,
                   {std::string("kernel '") + isa->name + "' needs",
                    cpu::feature_names(isa->required), "lacks " + cpu::feature_names(bit)},
                   [&] { choose_isa(isa->name, isa->required & ~bit); });
    }
  }
}

TEST(FeaturesTest, NamesEachFeature) {
  EXPECT_EQ(cpu::feature_names(0), "");
  EXPECT_EQ(cpu::feature_names(cpu::kAvx2), "avx2");
  EXPECT_EQ(cpu::feature_names(cpu::kAvx2 | cpu::kFma), "avx2, fma");
  EXPECT_FALSE(cpu::host_name().empty());
}

class ForcedKernelTest : public test::CpuKernelTest {};

TEST_P(ForcedKernelTest, IsTheOneThatRuns) {
  const test::Layer layer = test::make_layer({.k = 64, .n = 32});
  CpuBackend::Context context(1);
  const auto linear = CpuBackend::load_gptq(context, layer.tensors(), layer.spec(), options());
  EXPECT_EQ(linear->describe().kernel, GetParam().name);
  EXPECT_EQ(linear->describe().arch, GetParam().name);
  EXPECT_EQ(linear->describe().compute, to_string(GetParam().compute));
}

INSTANTIATE_TEST_SUITE_P(Kernels, ForcedKernelTest, ::testing::ValuesIn(test::cpu_kernels()),
                         test::kernel_name);

// The logistic function of every instruction set, at both ends, around 0 and where it is not a number.
TEST(SigmoidTest, IsWithinItsBound) {
  for (const IsaKernels* isa : isa_kernels()) {
    if (!test::is_usable(*isa)) continue;
    std::vector<float> x;
    for (int i = -2000; i <= 2000; ++i) x.push_back(static_cast<float>(i) * 0.0437F);
    x.insert(x.end(), {0.0F, -0.0F, 1e-30F, 1e30F, -1e30F, std::numeric_limits<float>::infinity(),
                       -std::numeric_limits<float>::infinity()});
    std::vector<float> y(x.size());
    isa->sigmoid(x.data(), y.data(), static_cast<std::int64_t>(x.size()));
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double expected = 1.0 / (1.0 + std::exp(-static_cast<double>(x[i])));
      // Below exp(-87) a result is too small for anything that it is multiplied by.
      EXPECT_NEAR(static_cast<double>(y[i]), expected,
                  expected * test::tolerances::kActivationSigmoid + 2e-38)
          << isa->name << ", x " << x[i];
    }
    const float nan = std::numeric_limits<float>::quiet_NaN();
    isa->sigmoid(&nan, y.data(), 1);
    EXPECT_TRUE(std::isnan(y[0])) << isa->name;
  }
}

TEST(ComputeTest, AutoIsInt16WhereThereIsAUnit) {
  for (const IsaKernels* isa : isa_kernels()) {
    const Compute chosen = cpu::choose_compute(Compute::kAuto, *isa);
    EXPECT_EQ(chosen, isa->int16_by_default ? Compute::kInt16 : Compute::kFloat32) << isa->name;
    EXPECT_TRUE(cpu::arithmetic_of(*isa, chosen).native) << isa->name;
    for (const Compute compute :
         {Compute::kFloat32, Compute::kInt16, Compute::kBFloat16, Compute::kInt8}) {
      EXPECT_EQ(cpu::choose_compute(compute, *isa), compute) << isa->name;
    }
  }
}

TEST_P(ForcedKernelTest, SaysWhetherTheComputeTypeIsEmulated) {
  const test::Layer layer = test::make_layer({.k = 64, .n = 32});
  CpuBackend::Context context(1);
  const auto linear = CpuBackend::load_gptq(context, layer.tensors(), layer.spec(), options());
  const bool native = cpu::arithmetic_of(choose_isa(GetParam().name), GetParam().compute).native;
  const std::string schedule = linear->describe().schedule;
  EXPECT_EQ(schedule.find("emulated by float32") == std::string::npos, native) << schedule;
}

TEST(UnforcedKernelTest, IsTheBest) {
  const test::Layer layer = test::make_layer({.k = 64, .n = 32});
  CpuBackend::Context context(1);
  const auto linear = CpuBackend::load_gptq(context, layer.tensors(), layer.spec());
  EXPECT_EQ(linear->describe().kernel, choose_isa({}).name);
}

}  // namespace
}  // namespace marlinq
