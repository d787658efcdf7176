// The load path that backends share: validate, pack, construct. A backend's loaders are one-liners
// into it.
#pragma once

#include <concepts>
#include <cstddef>
#include <memory>
#include <new>
#include <span>
#include <vector>

#include "core/gptq_checks.hpp"
#include "core/marlin_linear.hpp"
#include "marlinq/gptq.hpp"
#include "marlinq/linear.hpp"
#include "marlinq/load_options.hpp"

namespace marlinq {

/// A backend that packs layers which have been validated.
template <class B>
concept PacksGptq =
    PackedGemm<B> && requires(typename B::Context& context, std::span<const GptqWeights> experts,
                              const LoadOptions& options) {
      {
        B::pack(context, experts, options)
      } -> std::same_as<std::shared_ptr<const typename B::Packed>>;
    };

template <PacksGptq B>
std::unique_ptr<Linear<B>> load_gptq_with(typename B::Context& context, const GptqTensors& tensors,
                                          const GptqSpec& spec, const LoadOptions& options) {
  const GptqWeights weights = validate(tensors, spec);
  return std::make_unique<MarlinLinear<B>>(B::pack(context, {&weights, 1}, options), 0);
}

/// check_structure() of expert e of a stack; `before` are those of the experts up to it. Experts share
/// k, n, bits, group size and the split into fused modules.
inline GptqWeights check_expert_structure(std::span<const GptqTensors> experts, std::size_t e,
                                          const GptqSpec& spec,
                                          std::span<const GptqWeights> before) {
  if (before.empty()) return check_structure(experts[e], spec);
  const GptqWeights& first = before.front();
  GptqSpec shared = spec;
  shared.k = first.k;
  GptqWeights here = check_structure(experts[e], shared);
  if (here.modules.size() != first.modules.size()) {
    refuse_argument(concat("experts[", e, "]: ", here.modules.size(), " fused modules, expected ",
                           first.modules.size(), " as in experts[0]"));
  }
  for (std::size_t i = 0; i < here.modules.size(); ++i) {
    const ValidatedModule& module = here.modules[i];
    const ValidatedModule& model = first.modules[i];
    const auto place = [&] {
      return concat("experts[", e, "]", module.name.empty() ? "" : " ", module.name);
    };
    if (module.n != model.n) {
      refuse_argument(
          concat(place(), ": n = ", module.n, ", expected ", model.n, " as in experts[0]"));
    }
    if (module.scale_dtype != model.scale_dtype) {
      refuse_argument(concat(place(), ": scales are ", to_string(module.scale_dtype), ", expected ",
                             to_string(model.scale_dtype), " as in experts[0]"));
    }
    if ((module.bias == nullptr) != (model.bias == nullptr)) {
      refuse_argument(concat(place(), module.bias == nullptr
                                          ? ": no bias, but experts[0] has one"
                                          : ": a bias, but experts[0] has none"));
    }
  }
  return here;
}

inline void check_any_experts(std::span<const GptqTensors> experts) {
  if (experts.empty()) refuse_argument("experts: none, expected at least one");
}

inline std::vector<GptqWeights> validate_experts(std::span<const GptqTensors> experts,
                                                 const GptqSpec& spec) {
  check_any_experts(experts);
  std::vector<GptqWeights> validated;
  validated.reserve(experts.size());
  for (std::size_t e = 0; e < experts.size(); ++e) {
    GptqWeights& weights =
        validated.emplace_back(check_expert_structure(experts, e, spec, validated));
    check_values(experts[e], spec, weights);
  }
  return validated;
}

template <PacksGptq B>
std::shared_ptr<MarlinExpertStack<B>> load_gptq_stacked_with(typename B::Context& context,
                                                             std::span<const GptqTensors> experts,
                                                             const GptqSpec& spec,
                                                             const LoadOptions& options) {
  const std::vector<GptqWeights> validated = validate_experts(experts, spec);
  return std::make_shared<MarlinExpertStackImpl<B>>(B::pack(context, validated, options));
}

}  // namespace marlinq
