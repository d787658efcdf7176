// The kernels of the CPU backend as test parameters; those that the machine lacks are skipped, and
// seen to be.
#pragma once

#include <gtest/gtest.h>

#include <ostream>
#include <string>
#include <vector>

#include "cpu/dispatch.hpp"
#include "cpu/features.hpp"
#include "marlinq/cpu/cpu_backend.hpp"
#include "support/compare.hpp"

namespace marlinq::test {

/// A kernel with one of its compute types.
struct CpuKernel {
  std::string name;
  Compute compute;

  friend std::ostream& operator<<(std::ostream& stream, const CpuKernel& kernel) {
    return stream << kernel.name << ", " << to_string(kernel.compute);
  }
};

inline std::vector<CpuKernel> cpu_kernels() {
  std::vector<CpuKernel> kernels;
  for (const cpu::IsaKernels* isa : cpu::isa_kernels()) {
    for (const Compute compute :
         {Compute::kFloat32, Compute::kInt16, Compute::kBFloat16, Compute::kInt8}) {
      kernels.push_back({isa->name, compute});
    }
  }
  return kernels;
}

inline bool is_usable(const cpu::IsaKernels& isa) {
  return (isa.required & cpu::host_features()) == isa.required;
}

/// A test of a kernel that this machine can run, with one compute type.
class CpuKernelTest : public ::testing::TestWithParam<CpuKernel> {
 protected:
  void SetUp() override {
    for (const cpu::IsaKernels* isa : cpu::isa_kernels()) {
      if (isa->name == GetParam().name && !is_usable(*isa)) {
        GTEST_SKIP() << "kernel " << isa->name << " needs " << cpu::feature_names(isa->required);
      }
    }
  }

  LoadOptions options() const {
    LoadOptions options;
    options.kernel = GetParam().name;
    options.compute = GetParam().compute;
    return options;
  }

  /// The error that the compute type may have.
  double bound() const { return linear_bound(to_string(GetParam().compute)); }
};

inline std::string kernel_name(const ::testing::TestParamInfo<CpuKernel>& test) {
  return test.param.name + "_" + std::string(to_string(test.param.compute));
}

}  // namespace marlinq::test
