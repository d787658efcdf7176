#include "support/moe_reference.hpp"

#include <cmath>

namespace marlinq::test {

namespace {

double sigmoid_of(double x) { return 1 / (1 + std::exp(-x)); }

}  // namespace

double activation_of(Activation activation, double g, double u) {
  switch (activation) {
    case Activation::kSilu:
      return g * sigmoid_of(g) * u;
    case Activation::kGelu:
      return g * 0.5 * std::erfc(-g / std::sqrt(2.0)) * u;
    case Activation::kGeluTanh: {
      const double inner = std::sqrt(2 / std::acos(-1.0)) * (g + 0.044715 * g * g * g);
      return g * sigmoid_of(2 * inner) * u;  // (1 + tanh t) / 2 = sigmoid(2 t)
    }
    case Activation::kClampedSwiglu: {
      const double gate = g > 7 ? 7 : g;
      const double up = u > 7 ? 7 : (u < -7 ? -7 : u);
      return (up + 1) * gate * sigmoid_of(1.702 * gate);
    }
  }
  return 0;
}

Matrix random_topk_ids(std::int64_t tokens, int top_k, std::int64_t experts, DType dtype,
                       int percent_absent, Random& random, std::int64_t extra_stride) {
  Matrix ids(tokens, top_k, dtype, extra_stride);
  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::int64_t first = random.below(experts);
    for (int s = 0; s < top_k; ++s) {
      ids.set(
          t, s,
          random.chance(percent_absent) ? -1.0 : static_cast<double>((first + s * 3) % experts));
    }
  }
  return ids;
}

Matrix random_topk_weights(std::int64_t tokens, int top_k, Random& random,
                           std::int64_t extra_stride) {
  Matrix weights(tokens, top_k, DType::kFloat32, extra_stride);
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (int s = 0; s < top_k; ++s) weights.set(t, s, 0.05 + random.uniform());
  }
  return weights;
}

Experts make_experts(std::int64_t count, int fused_parts, LayerOptions options) {
  Experts experts;
  const Order order = options.order;
  for (std::int64_t e = 0; e < count; ++e) {
    std::vector<Layer> parts;
    for (int part = 0; part < fused_parts; ++part) {
      options.order = e % 3 == 2 && order != Order::kNone ? Order::kTrivial : order;
      options.name = "experts." + std::to_string(e) + "." + std::to_string(part);
      ++options.seed;
      parts.push_back(make_layer(options));
    }
    experts.parts.push_back(std::move(parts));
  }
  return experts;
}

std::vector<double> MoeReference::expert(const Dense& up, const Dense& back,
                                         const std::vector<double>& x) const {
  const std::vector<double> gu = multiply(x, 1, up).y;
  std::vector<double> hidden;
  const std::size_t inner = gu.size() / 2;
  for (std::size_t i = 0; i < inner; ++i) {
    hidden.push_back(activation_of(activation, gu[i], gu[inner + i]));
  }
  return multiply(hidden, 1, back).y;
}

std::vector<double> MoeReference::forward(const Matrix& x, const Matrix& ids, const Matrix& weights,
                                          const Matrix* shared_output) const {
  std::vector<double> all;
  const std::int64_t hidden = gate_up.front().k;
  for (std::int64_t t = 0; t < x.rows(); ++t) {
    std::vector<double> token;
    for (std::int64_t i = 0; i < hidden; ++i) token.push_back(x.at(t, i));
    std::vector<double> y(static_cast<std::size_t>(hidden), 0.0);
    for (std::int64_t slot = 0; slot < ids.cols(); ++slot) {
      const auto id = static_cast<std::int64_t>(ids.at(t, slot));
      if (id < 0) continue;
      const double weight = weights.at(t, slot);
      const bool on_input = router_weight == RouterWeight::kOnInput;
      std::vector<double> input = token;
      for (double& value : input) value *= on_input ? weight : 1.0;
      const std::vector<double> out =
          expert(gate_up[static_cast<std::size_t>(id)], down[static_cast<std::size_t>(id)], input);
      for (std::size_t i = 0; i < y.size(); ++i) y[i] += out[i] * (on_input ? 1.0 : weight);
    }
    if (shared || shared_output != nullptr) {
      double factor = 1;
      if (!shared_gate.empty()) {
        double dot = 0;
        for (std::size_t i = 0; i < token.size(); ++i) {
          dot += token[i] * static_cast<double>(shared_gate[i]);
        }
        factor = sigmoid_of(dot);
      }
      std::vector<double> out;
      if (shared) {
        out = expert(shared->first, shared->second, token);
      } else {
        for (std::int64_t i = 0; i < hidden; ++i) out.push_back(shared_output->at(t, i));
      }
      for (std::size_t i = 0; i < y.size(); ++i) y[i] += factor * out[i];
    }
    all.insert(all.end(), y.begin(), y.end());
  }
  return all;
}

std::vector<GptqTensors> Experts::tensors() const {
  std::vector<GptqTensors> all;
  for (const std::vector<Layer>& expert : parts) all.push_back(fused(expert));
  return all;
}

std::vector<Dense> Experts::dense() const {
  std::vector<Dense> all;
  for (const std::vector<Layer>& expert : parts) all.push_back(fused_dense(expert));
  return all;
}

}  // namespace marlinq::test
