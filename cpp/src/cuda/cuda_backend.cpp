// The CUDA backend's side of the trait, and its linear layer.
#include "marlinq/cuda/cuda_backend.hpp"

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "core/elements.hpp"
#include "core/gptq_checks.hpp"
#include "core/matrix_checks.hpp"
#include "core/zero_point_names.hpp"
#include "cuda/arch_table.hpp"
#include "cuda/context.hpp"
#include "cuda/cuda_check.hpp"
#include "cuda/gather.hpp"
#include "cuda/info.hpp"

namespace marlinq {
namespace cuda {
namespace {

FloatType float_type(DType dtype) noexcept {
  return dtype == DType::kFloat16    ? FloatType::kF16
         : dtype == DType::kBFloat16 ? FloatType::kBF16
                                     : FloatType::kF32;
}

/// A GPTQ linear layer on one device; shared by any number of contexts and streams of that device.
class CudaMarlinLinear final : public Linear<CudaBackend> {
 public:
  CudaMarlinLinear(DeviceWeight weight, const ArchKernels& arch, Description description,
                   BatchInvariance invariance)
      : weight_(std::move(weight)),
        arch_(arch),
        description_(std::move(description)),
        invariance_(invariance) {}

  std::int64_t in_features() const noexcept override { return description_.k; }
  std::int64_t out_features() const noexcept override { return description_.n; }
  Description describe() const override { return description_; }

  void forward(CudaContext& context, const ConstMatrixView& input, const MatrixView& output,
               std::int64_t m) const override {
    check_rows(m);
    const Device device = weight_.memory.device();
    if (context.device() != device) {
      refuse_argument(
          concat("context: on ", to_string(context.device()), ", expected ", to_string(device)));
    }
    check_input(input, "x", device, m, description_.k);
    check_output(output, "out", device, m, description_.n, input.dtype);
    if (m == 0) return;
    ContextState& state = context.state();
    const DeviceGuard guard(state.device);
    state.captured = state.captured || state.capturing();
    weight_.ready.precede(state.stream);
    for (const Segment& segment : weight_.segments) run(state, segment, input, output, m);
  }

 private:
  void run(ContextState& state, const Segment& segment, const ConstMatrixView& input,
           const MatrixView& output, std::int64_t m) const {
    const auto y_size = static_cast<std::int64_t>(size_of(output.dtype));
    GemmProblem problem{
        .weight = segment.view,
        .x = input.data,
        .x_type = input.dtype == DType::kBFloat16 ? FloatType::kBF16 : FloatType::kF16,
        .x_stride = input.row_stride,
        .x_columns = segment.view.k,
        .y = static_cast<unsigned char*>(output.data) + segment.first_feature * y_size,
        .y_type = float_type(output.dtype),
        .y_stride = output.row_stride,
        .m = static_cast<std::int32_t>(m)};
    if (needs_gather(segment, input, m)) {
      const std::int32_t columns = segment.view.chunks * 64;
      void* gathered = state.grow_gather(m * columns);
      gather_rows(input.data, float_type(input.dtype), input.row_stride, problem.m, segment.view.k,
                  segment.view.source, gathered, problem.x_type, columns, state.limits,
                  state.limits.capability >= 90, state.stream);
      problem.x = gathered;
      problem.x_stride = columns;
      problem.x_columns = columns;
    }
    // Kernels count 16-byte pieces of x in 32 bits.
    constexpr std::int64_t kMostElements = std::int64_t{8} << 32;
    constexpr std::int64_t kRowMultiple = 512;
    const std::int64_t most = std::clamp(
        kMostElements / std::max<std::int64_t>(problem.x_stride, 1) / kRowMultiple * kRowMultiple,
        kRowMultiple, std::int64_t{1} << 24);
    for (std::int64_t first = 0; first < m; first += most) {
      GemmProblem part = problem;
      part.x = static_cast<const unsigned char*>(problem.x) + first * problem.x_stride * 2;
      part.y = static_cast<unsigned char*>(problem.y) + first * problem.y_stride * y_size;
      part.m = static_cast<std::int32_t>(std::min(most, m - first));
      arch_.launch(part, arch_.plan(part, state.limits, invariance_), state.split_scratch(),
                   state.stream);
    }
  }

  // Kernels copy 16 bytes of x at a time, in the order of the packed rows.
  static bool needs_gather(const Segment& segment, const ConstMatrixView& input, std::int64_t m) {
    constexpr std::uintptr_t kPiece = 16;
    const bool aligned = reinterpret_cast<std::uintptr_t>(input.data) % kPiece == 0 &&
                         (m == 1 || input.row_stride % 8 == 0) && segment.view.k % 8 == 0;
    return input.dtype == DType::kFloat32 || segment.view.source != nullptr || !aligned;
  }

  DeviceWeight weight_;
  const ArchKernels& arch_;
  Description description_;
  BatchInvariance invariance_;
};

Description describe_layer(const GptqWeights& weights, const DeviceWeight& packed,
                           const ArchKernels& arch, Device device, const DeviceLimits& limits,
                           BatchInvariance invariance) {
  Description d;
  d.backend = CudaBackend::kName;
  d.device = to_string(device);
  d.arch = arch.name;
  d.kernel = arch.name;
  d.compute = "float16";
  d.schedule = schedule_text(packed, arch, limits, invariance);
  d.bits = weights.bits;
  d.group_size = weights.group_size;
  d.k = weights.k;
  d.n = weights.n;
  d.k_padded = packed.k_padded;
  d.n_padded = packed.n_padded;
  d.symmetric = true;
  for (const ValidatedModule& module : weights.modules) {
    d.fused.push_back(module.n);
    d.symmetric = d.symmetric && module.symmetric;
    d.act_order = d.act_order || module.act_order;
    d.bias = d.bias || module.bias != nullptr;
    d.checkpoint_bytes += static_cast<std::int64_t>(module.bytes);
  }
  d.zero_points = zero_point_names(weights);
  d.batch_invariant = invariance == BatchInvariance::kRequired;
  d.scale_dtype = to_string(weights.modules.front().scale_dtype);
  d.packed_bytes = packed.memory.size() * 4;
  d.warnings = weights.warnings;
  return d;
}

std::string layer_name(const GptqWeights& weights) {
  std::string name;
  for (const ValidatedModule& module : weights.modules) {
    if (!module.name.empty()) name += (name.empty() ? "" : " + ") + module.name;
  }
  return name.empty() ? "layer" : name;
}

// The tensors are on their way while their values are looked at.
DeviceWeight load_layer(ContextState& state, const ArchKernels& arch, const GptqTensors& tensors,
                        const GptqSpec& spec, GptqWeights& weights) {
  const DeviceGuard guard(state.device);
  const RelaxedCapture relaxed;
  try {
    LayerUpload upload(state.uploads(), weights);
    check_values(tensors, spec, weights);
    return arch.pack({&weights, 1}, upload);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kOutOfMemory) throw;
    throw Error(ErrorCode::kOutOfMemory, concat(layer_name(weights), ": ", error.what()),
                error.where());
  }
}

}  // namespace
}  // namespace cuda

std::unique_ptr<Linear<CudaBackend>> CudaBackend::load_gptq(Context& context,
                                                            const GptqTensors& tensors,
                                                            const GptqSpec& spec,
                                                            const LoadOptions& options) {
  if (options.compute != Compute::kAuto) {
    throw Error(ErrorCode::kUnsupported,
                concat("backend 'cuda' does not support compute '", to_string(options.compute),
                       "'; activations decide between float16 and bfloat16"));
  }
  GptqWeights weights = check_structure(tensors, spec);
  cuda::ContextState& state = context.state();
  const cuda::ArchKernels& arch = cuda::choose_arch(options.kernel, state.limits.capability);
  cuda::DeviceWeight packed = cuda::load_layer(state, arch, tensors, spec, weights);
  Description description = cuda::describe_layer(weights, packed, arch, context.device(),
                                                 state.limits, options.batch_invariance);
  return std::make_unique<cuda::CudaMarlinLinear>(std::move(packed), arch, std::move(description),
                                                  options.batch_invariance);
}

CudaBackend::Context CudaBackend::open(Device device, const ContextOptions& options) {
  return Context(device.index, options.stream);
}

}  // namespace marlinq
