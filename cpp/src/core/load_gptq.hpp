// The load path that backends share: validate, pack, construct. A backend's loaders are one-liners
// into it.
#pragma once

#include <memory>
#include <new>
#include <span>
#include <vector>

#include "core/marlin_linear.hpp"
#include "marlinq/gptq.hpp"
#include "marlinq/linear.hpp"
#include "marlinq/load_options.hpp"

namespace marlinq {

template <PackedGemm B>
std::unique_ptr<Linear<B>> load_gptq_with(typename B::Context& context, const GptqTensors& tensors,
                                          const GptqSpec& spec, const LoadOptions& options) {
  const GptqWeights weights = validate(tensors, spec);
  return std::make_unique<MarlinLinear<B>>(B::pack(context, {&weights, 1}, options), 0);
}

/// Experts share k, n, bits, group size and the split into fused modules.
inline std::vector<GptqWeights> validate_experts(std::span<const GptqTensors> experts,
                                                 const GptqSpec& spec) {
  if (experts.empty()) refuse_argument("experts: none, expected at least one");
  std::vector<GptqWeights> validated;
  validated.reserve(experts.size());
  GptqSpec shared = spec;
  for (std::size_t e = 0; e < experts.size(); ++e) {
    validated.push_back(validate(experts[e], shared));
    const GptqWeights& first = validated.front();
    const GptqWeights& here = validated.back();
    shared.k = first.k;
    if (here.modules.size() != first.modules.size()) {
      refuse_argument(concat("experts[", e, "]: ", here.modules.size(), " fused modules, expected ",
                             first.modules.size(), " as in experts[0]"));
    }
    for (std::size_t i = 0; i < here.modules.size(); ++i) {
      const ValidatedModule& module = here.modules[i];
      const ValidatedModule& model = first.modules[i];
      const std::string place =
          concat("experts[", e, "]", module.name.empty() ? "" : " ", module.name);
      if (module.n != model.n) {
        refuse_argument(
            concat(place, ": n = ", module.n, ", expected ", model.n, " as in experts[0]"));
      }
      if (module.scale_dtype != model.scale_dtype) {
        refuse_argument(concat(place, ": scales are ", to_string(module.scale_dtype), ", expected ",
                               to_string(model.scale_dtype), " as in experts[0]"));
      }
      if ((module.bias == nullptr) != (model.bias == nullptr)) {
        refuse_argument(concat(place, module.bias == nullptr
                                          ? ": no bias, but experts[0] has one"
                                          : ": a bias, but experts[0] has none"));
      }
    }
  }
  return validated;
}

template <PackedGemm B>
std::shared_ptr<MarlinExpertStack<B>> load_gptq_stacked_with(typename B::Context& context,
                                                             std::span<const GptqTensors> experts,
                                                             const GptqSpec& spec,
                                                             const LoadOptions& options) {
  const std::vector<GptqWeights> validated = validate_experts(experts, spec);
  return std::make_shared<MarlinExpertStackImpl<B>>(B::pack(context, validated, options));
}

}  // namespace marlinq
