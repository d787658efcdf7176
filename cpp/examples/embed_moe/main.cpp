// A mixture-of-experts layer as a server runs it: loaded once, then logits of the router and hidden
// states in, a residual stream out. On the first GPU, or on the CPU where there is none; the same code
// either way.
#include <array>
#include <cstdint>
#include <cstdio>
#include <marlinq/marlinq.hpp>
#include <vector>

namespace {

constexpr std::int64_t kHidden = 2;
constexpr std::int64_t kExperts = 4;
constexpr int kTopK = 2;

marlinq::Device choose_device() {
  for (const marlinq::BackendInfo& backend : marlinq::backends()) {
    if (backend.name == "cuda" && !backend.devices.empty()) {
      return marlinq::parse_device(backend.devices.front());
    }
  }
  return {};
}

/// A matrix in the memory of a context's device.
struct DeviceMatrix {
  DeviceMatrix(const marlinq::ContextHandle& context, marlinq::DType dtype, std::int64_t rows,
               std::int64_t cols)
      : memory(context.allocate(dtype, rows * cols)),
        view{memory.data(), dtype, memory.device(), rows, cols, cols} {}

  marlinq::BufferHandle memory;
  marlinq::MatrixView view;
};

/// A matrix of float32 in host memory.
marlinq::MatrixView on_host(std::vector<float>& values, std::int64_t cols) {
  const auto rows = static_cast<std::int64_t>(values.size()) / cols;
  return {values.data(), marlinq::DType::kFloat32, {}, rows, cols, cols};
}

/// One projection of one expert: 4-bit codes, a word for each output feature, and their scales.
struct Projection {
  std::int64_t k;
  std::array<std::int32_t, 2> codes;
  std::array<float, 2> scales;

  marlinq::GptqModule module() const {
    marlinq::GptqModule module;
    module.qweight = {codes.data(), sizeof codes, marlinq::DType::kInt32, {1, 2}, 2};
    module.scales = {scales.data(), sizeof scales, marlinq::DType::kFloat32, {1, 2}, 2};
    return module;
  }
};

marlinq::ExpertStackHandle load_stack(const marlinq::ContextHandle& context,
                                      const std::vector<Projection>& experts) {
  std::vector<marlinq::GptqTensors> tensors;
  for (const Projection& expert : experts) tensors.emplace_back(expert.module());
  return context.load_gptq_stacked(tensors, {.bits = 4, .group_size = -1, .k = experts.front().k});
}

class MoeLayer {
 public:
  /// Expert e has one inner feature: gate 4 (x0 + x1) * 4, up 4 (x0 + x1) * 3 e / 32; down takes it
  /// times 1 and times 2. A code of c is a weight of c - 8 times the scale.
  explicit MoeLayer(const marlinq::ContextHandle& context) : block_(make_block(context)) {}

  /// Adds the layer's output for x [T, H] to the residual stream [T, H], all on the device.
  void forward(const marlinq::ContextHandle& context, const marlinq::ConstMatrixView& x,
               const marlinq::ConstMatrixView& logits, const marlinq::MatrixView& stream) const {
    const DeviceMatrix ids(context, marlinq::DType::kInt32, x.rows, kTopK);
    const DeviceMatrix weights(context, marlinq::DType::kFloat32, x.rows, kTopK);
    context.route(logits, {.top_k = kTopK}, ids.view, weights.view);
    marlinq::MoeInput input;
    input.x = x;
    input.topk_ids = as_const(ids.view);
    input.topk_weights = as_const(weights.view);
    input.residual = as_const(stream);
    block_.forward(context, input, stream);
    context.synchronise();  // ids and weights end here
  }

 private:
  static marlinq::MoeBlockHandle make_block(const marlinq::ContextHandle& context) {
    std::vector<Projection> gate_up;
    std::vector<Projection> down;
    for (std::int64_t e = 0; e < kExperts; ++e) {
      const float scale = static_cast<float>(3 * e) / 32.0F;
      gate_up.push_back({.k = kHidden, .codes = {0xCC, 0xCC}, .scales = {4.0F, scale}});
      down.push_back({.k = 1, .codes = {0x9, 0x9}, .scales = {1.0F, 2.0F}});
    }
    return context.make_moe_block({.gate_up = load_stack(context, gate_up),
                                   .down = load_stack(context, down),
                                   .activation = marlinq::Activation::kSilu});
  }

  marlinq::MoeBlockHandle block_;
};

}  // namespace

int main() {
  try {
    const marlinq::ContextHandle context = marlinq::open_context(choose_device());
    const MoeLayer layer(context);

    std::vector<float> x = {1, 1};
    std::vector<float> logits = {0, 5, 5, -1};  // experts 1 and 2, with a weight of 0.5 each
    std::vector<float> y = {0, 0};              // the residual stream
    const DeviceMatrix there_x(context, marlinq::DType::kFloat32, 1, kHidden);
    const DeviceMatrix there_logits(context, marlinq::DType::kFloat32, 1, kExperts);
    const DeviceMatrix there_y(context, marlinq::DType::kFloat32, 1, kHidden);
    context.copy(as_const(on_host(x, kHidden)), there_x.view);
    context.copy(as_const(on_host(logits, kExperts)), there_logits.view);
    context.copy(as_const(on_host(y, kHidden)), there_y.view);
    layer.forward(context, as_const(there_x.view), as_const(there_logits.view), there_y.view);
    context.copy(as_const(there_y.view), on_host(y, kHidden));

    std::printf("marlinq %s on %s\n", MARLINQ_VERSION, to_string(context.device()).c_str());
    std::printf("y = %g %g\n", static_cast<double>(y[0]), static_cast<double>(y[1]));
  } catch (const marlinq::Error& error) {
    std::fprintf(stderr, "%s: %s\n", marlinq::to_string(error.code()).data(), error.what());
    return 1;
  }
  return 0;
}
