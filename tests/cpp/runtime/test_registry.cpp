// The table of backends and the way to a context.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "marlinq/registry.hpp"
#include "marlinq/version.hpp"
#include "support/compare.hpp"

namespace marlinq {
namespace {

using test::expect_error;

TEST(RegistryTest, ListsTheCpu) {
  const std::vector<BackendInfo> all = backends();
  const auto cpu = std::find_if(all.begin(), all.end(),
                                [](const BackendInfo& info) { return info.name == "cpu"; });
  ASSERT_NE(cpu, all.end());
  EXPECT_EQ(cpu->devices, (std::vector<std::string>{"cpu"}));
  EXPECT_FALSE(cpu->hardware.empty());
  EXPECT_NE(std::find(cpu->compute.begin(), cpu->compute.end(), "float32"), cpu->compute.end());
}

TEST(RegistryTest, KernelsAreListedAndOneIsChosen) {
  for (const BackendInfo& info : backends()) {
    int chosen = 0;
    for (const KernelInfo& kernel : info.kernels) {
      EXPECT_FALSE(kernel.name.empty());
      chosen += kernel.chosen ? 1 : 0;
      if (kernel.chosen) {
        EXPECT_TRUE(kernel.usable) << kernel.name;
      }
    }
    EXPECT_EQ(chosen, info.devices.empty() ? 0 : 1) << info.name;
  }
}

TEST(RegistryTest, DevicesOfEveryBackendOpen) {
  for (const BackendInfo& info : backends()) {
    for (const std::string& device : info.devices) {
      const ContextHandle context = open_context(parse_device(device));
      EXPECT_EQ(context.backend(), info.name);
      EXPECT_EQ(to_string(context.device()), device);
      EXPECT_GE(context.threads(), 1);
      EXPECT_EQ(context.scratch_allocations(), 0);
    }
  }
}

TEST(RegistryTest, ThreadsOfAContext) {
  EXPECT_EQ(open_context({}, {.threads = 3}).threads(), 3);
  expect_error(ErrorCode::kInvalidArgument, {"threads: -1"},
               [] { open_context({}, {.threads = -1}); });
}

TEST(RegistryTest, ADeviceOfNoBackendNamesThoseThereAre) {
  const std::vector<BackendInfo> all = backends();
  if (std::any_of(all.begin(), all.end(), [](const auto& info) { return info.name == "cuda"; })) {
    GTEST_SKIP() << "this build runs CUDA devices";
  }
  expect_error(
      ErrorCode::kUnsupported,
      {"device 'cuda:2'", "no backend", "backends: cpu", "built without the CUDA backend: "},
      [] { open_context({DeviceKind::kCuda, 2}); });
}

// There is one CPU; a device that does not exist is an error, not the one that does.
TEST(RegistryTest, ADeviceThatDoesNotExist) {
  for (const int index : {1, -1, 1000}) {
    expect_error(ErrorCode::kDevice, {"cpu"}, [&] { open_context({DeviceKind::kCpu, index}); });
  }
}

TEST(RegistryTest, TheBuildTellsWhatItHas) {
  const std::vector<BackendInfo> all = backends();
  const bool cuda =
      std::any_of(all.begin(), all.end(), [](const auto& info) { return info.name == "cuda"; });
  EXPECT_TRUE(
      build_note().starts_with(cuda ? "with the CUDA backend: " : "without the CUDA backend: "))
      << build_note();
}

TEST(RegistryTest, Version) { EXPECT_EQ(version(), MARLINQ_VERSION); }

}  // namespace
}  // namespace marlinq
