// The kernels of the CPU backend as test parameters; those that the machine lacks are skipped, and
// seen to be.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cpu/dispatch.hpp"
#include "cpu/features.hpp"
#include "marlinq/cpu/cpu_backend.hpp"

namespace marlinq::test {

inline std::vector<std::string> cpu_kernel_names() {
  std::vector<std::string> names;
  for (const cpu::IsaKernels* isa : cpu::isa_kernels()) names.emplace_back(isa->name);
  return names;
}

inline bool is_usable(const cpu::IsaKernels& isa) {
  return (isa.required & cpu::host_features()) == isa.required;
}

/// A test with the name of a kernel that this machine can run.
class CpuKernelTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    for (const cpu::IsaKernels* isa : cpu::isa_kernels()) {
      if (isa->name == GetParam() && !is_usable(*isa)) {
        GTEST_SKIP() << "kernel " << GetParam() << " needs " << cpu::feature_names(isa->required);
      }
    }
  }

  LoadOptions options() const {
    LoadOptions options;
    options.kernel = GetParam();
    return options;
  }
};

inline std::string kernel_name(const ::testing::TestParamInfo<std::string>& test) {
  return test.param;
}

}  // namespace marlinq::test
