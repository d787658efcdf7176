#include "cpu/dispatch.hpp"

#include <algorithm>
#include <string>
#include <vector>

#include "core/concat.hpp"
#include "cpu/features.hpp"
#include "marlinq/error.hpp"
#include "marlinq_cpu_isa_list.hpp"  // generated: declares <isa>::kKernels and MARLINQ_CPU_ISA_LIST

namespace marlinq::cpu {

std::span<const IsaKernels* const> isa_kernels() {
  static const std::vector<const IsaKernels*> table = [] {
    std::vector<const IsaKernels*> all = {MARLINQ_CPU_ISA_LIST};
    std::sort(all.begin(), all.end(),
              [](const IsaKernels* a, const IsaKernels* b) { return a->priority > b->priority; });
    return all;
  }();
  return table;
}

const IsaKernels& choose_isa(std::string_view name) { return choose_isa(name, host_features()); }

const IsaKernels& choose_isa(std::string_view name, std::uint32_t mask) {
  std::string known;
  for (const IsaKernels* isa : isa_kernels()) {
    const bool usable = (isa->required & mask) == isa->required;
    if (name.empty() && usable) return *isa;
    if (name == isa->name) {
      if (usable) return *isa;
      throw Error(ErrorCode::kUnsupported,
                  concat("kernel '", name, "' needs ", feature_names(isa->required),
                         "; this machine lacks ", feature_names(isa->required & ~mask)));
    }
    known += (known.empty() ? "" : ", ") + std::string(isa->name);
  }
  throw Error(ErrorCode::kInvalidArgument, concat("kernel: '", name, "', expected one of ", known));
}

Compute choose_compute(Compute requested, const IsaKernels& isa) noexcept {
  if (requested != Compute::kAuto) return requested;
  return isa.int16_by_default ? Compute::kInt16 : Compute::kFloat32;
}

const Arithmetic& arithmetic_of(const IsaKernels& isa, Compute compute) noexcept {
  switch (compute) {
    case Compute::kInt16:
      return isa.int16;
    case Compute::kBFloat16:
      return isa.bfloat16;
    case Compute::kInt8:
      return isa.int8;
    case Compute::kFloat32:
    case Compute::kAuto:
      break;
  }
  return isa.float32;
}

}  // namespace marlinq::cpu
