// Chooses the architecture folder: once per load, by the device or by the name that
// LoadOptions::kernel gives.
#include <algorithm>
#include <string>

#include "core/concat.hpp"
#include "cuda/arch_table.hpp"
#include "marlinq/error.hpp"
#include "marlinq_cuda_arch_list.hpp"  // generated: declares <arch>::kKernels and MARLINQ_CUDA_ARCH_LIST

namespace marlinq::cuda {

std::span<const ArchKernels* const> arch_kernels() {
  static const std::vector<const ArchKernels*> table = [] {
    std::vector<const ArchKernels*> all = {MARLINQ_CUDA_ARCH_LIST};
    std::sort(all.begin(), all.end(),
              [](const ArchKernels* a, const ArchKernels* b) { return a->priority > b->priority; });
    return all;
  }();
  return table;
}

const ArchKernels& choose_arch(std::string_view name, int capability) {
  std::string known;
  for (const ArchKernels* arch : arch_kernels()) {
    const bool usable = arch->runs_on(capability);
    if (name.empty() && usable) return *arch;
    if (name == arch->name) {
      if (usable) return *arch;
      throw Error(ErrorCode::kUnsupported,
                  concat("kernel '", name, "' needs ", arch->requirement, "; this device has ",
                         capability / 10, ".", capability % 10));
    }
    known += (known.empty() ? "" : ", ") + std::string(arch->name);
  }
  if (name.empty()) {
    throw Error(ErrorCode::kUnsupported,
                concat("compute capability ", capability / 10, ".", capability % 10,
                       ": no kernel of this build runs it, expected 8.0 or newer"));
  }
  throw Error(ErrorCode::kInvalidArgument, concat("kernel: '", name, "', expected one of ", known));
}

}  // namespace marlinq::cuda
