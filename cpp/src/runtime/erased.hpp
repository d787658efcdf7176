// The type-erased side of the handles, and its one implementation for every backend.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <string_view>
#include <utility>
#include <vector>

#include "core/concat.hpp"
#include "marlinq/backend.hpp"
#include "marlinq/handle.hpp"
#include "marlinq/registry.hpp"
#include "runtime/host_staging.hpp"

namespace marlinq {
namespace detail {

class AnyLinear;

class AnyBuffer {
 public:
  virtual ~AnyBuffer() = default;
  virtual Device device() const noexcept = 0;
  virtual DType dtype() const noexcept = 0;
  virtual std::int64_t size() const noexcept = 0;
  virtual void* data() noexcept = 0;
};

class AnyContext {
 public:
  virtual ~AnyContext() = default;
  virtual std::string_view backend() const noexcept = 0;
  virtual Device device() const = 0;
  virtual int threads() const = 0;
  virtual void* stream() const = 0;
  virtual std::int64_t scratch_allocations() const = 0;
  virtual double peak_rate(const LoadOptions&) = 0;
  virtual LinearHandle load_gptq(const GptqTensors&, const GptqSpec&, const LoadOptions&) = 0;
  virtual ExpertStackHandle load_gptq_stacked(std::span<const GptqTensors>, const GptqSpec&,
                                              const LoadOptions&) = 0;
  virtual MoeBlockHandle make_moe_block(const MoeBlockSpec&) = 0;
  virtual void pregrow_marlin_gather_scratch(std::int64_t) = 0;
  virtual void route(const ConstMatrixView&, const RouteOptions&, const MatrixView&,
                     const MatrixView&) = 0;
  virtual void moe_align_block_size(const ConstMatrixView&, int, int, const ConstArrayView&,
                                    const ArrayView&, const ArrayView&, const ArrayView&) = 0;
  virtual BufferHandle allocate(DType, std::int64_t) = 0;
  virtual void copy(const ConstMatrixView&, const MatrixView&) = 0;
  virtual void synchronise() = 0;
  virtual bool captured() = 0;
  virtual std::vector<TunedSchedule> tune(const AnyLinear&, std::span<const std::int64_t>,
                                          DType) = 0;
};

class AnyLinear {
 public:
  virtual ~AnyLinear() = default;
  virtual std::string_view backend() const noexcept = 0;
  virtual std::int64_t in_features() const noexcept = 0;
  virtual std::int64_t out_features() const noexcept = 0;
  virtual Description describe() const = 0;
  virtual void forward(AnyContext&, const ConstMatrixView&, const MatrixView&,
                       std::int64_t) const = 0;
  virtual void forward_host(AnyContext&, const ConstMatrixView&, const MatrixView&,
                            std::int64_t) const = 0;
};

class AnyExpertStack {
 public:
  virtual ~AnyExpertStack() = default;
  virtual std::string_view backend() const noexcept = 0;
  virtual std::int64_t num_experts() const noexcept = 0;
  virtual std::int64_t k() const noexcept = 0;
  virtual std::int64_t n_per_expert() const noexcept = 0;
  virtual Description describe() const = 0;
  virtual LinearHandle expert(std::int64_t) const = 0;
  virtual void gemm_phase_batched(AnyContext&, const ConstMatrixView&,
                                  std::span<const ExpertDispatch>, const MatrixView&) const = 0;
  virtual void gemm_phase_fused(AnyContext&, const ConstMatrixView&, const FusedTiles&,
                                const MatrixView&) const = 0;
  virtual void gemm_phase_batched_host(AnyContext&, const ConstMatrixView&,
                                       std::span<const ExpertDispatch>,
                                       const MatrixView&) const = 0;
  virtual void gemm_phase_fused_host(AnyContext&, const ConstMatrixView&, const FusedTiles&,
                                     const MatrixView&) const = 0;
};

class AnyMoeBlock {
 public:
  virtual ~AnyMoeBlock() = default;
  virtual std::string_view backend() const noexcept = 0;
  virtual std::int64_t hidden_size() const noexcept = 0;
  virtual std::int64_t num_experts() const noexcept = 0;
  virtual void forward(AnyContext&, const MoeInput&, const MatrixView&) const = 0;
  virtual void forward_host(AnyContext&, const MoeInput&, const MatrixView&) const = 0;
};

/// Marks a context as in use for a scope. Throws invalid_argument if another thread is using it.
class ContextUse {
 public:
  explicit ContextUse(std::atomic_flag& busy) : busy_(busy) {
    if (busy_.test_and_set(std::memory_order_acquire)) {
      throw Error(ErrorCode::kInvalidArgument,
                  "context: in use by another thread, expected one context per thread");
    }
  }
  ContextUse(const ContextUse&) = delete;
  ContextUse& operator=(const ContextUse&) = delete;
  ~ContextUse() { busy_.clear(std::memory_order_release); }

 private:
  std::atomic_flag& busy_;
};

/// Runs f; memory that ran out anywhere becomes marlinq's own error.
template <class F>
auto guarded(F&& f) -> decltype(f()) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    throw Error(ErrorCode::kOutOfMemory, "out of host memory");
  } catch (const std::length_error&) {
    throw Error(ErrorCode::kOutOfMemory, "out of host memory");
  }
}

template <BackendQuantMarlin B>
class ContextModel;

template <BackendQuantMarlin B>
class BufferModel final : public AnyBuffer {
 public:
  explicit BufferModel(typename B::Buffer buffer) : buffer_(std::move(buffer)) {}

  Device device() const noexcept override { return buffer_.device(); }
  DType dtype() const noexcept override { return buffer_.dtype(); }
  std::int64_t size() const noexcept override { return buffer_.size(); }
  void* data() noexcept override { return buffer_.data(); }

 private:
  typename B::Buffer buffer_;
};

/// The backend's own object behind an erased one. Throws invalid_argument for another backend's.
template <template <class> class Model, class B, class Any>
auto& cast(Any& any, std::string_view what) {
  if (any.backend() != B::kName) {
    throw Error(ErrorCode::kInvalidArgument,
                concat(what, ": of backend '", any.backend(), "', expected '", B::kName, "'"));
  }
  if constexpr (std::is_const_v<Any>) {
    return static_cast<const Model<B>&>(any);
  } else {
    return static_cast<Model<B>&>(any);
  }
}

template <BackendQuantMarlin B>
class LinearModel final : public AnyLinear {
 public:
  explicit LinearModel(std::shared_ptr<const Linear<B>> linear) : linear_(std::move(linear)) {}

  std::string_view backend() const noexcept override { return B::kName; }
  std::int64_t in_features() const noexcept override { return linear_->in_features(); }
  std::int64_t out_features() const noexcept override { return linear_->out_features(); }
  Description describe() const override { return linear_->describe(); }
  void forward(AnyContext& context, const ConstMatrixView& input, const MatrixView& output,
               std::int64_t m) const override {
    auto& model = cast<ContextModel, B>(context, "context");
    const ContextUse use(model.busy());
    linear_->forward(model.context(), input, output, m);
  }
  void forward_host(AnyContext& context, const ConstMatrixView& input, const MatrixView& output,
                    std::int64_t m) const override {
    auto& model = cast<ContextModel, B>(context, "context");
    const ContextUse use(model.busy());
    if (model.on_cpu()) {
      linear_->forward(model.context(), input, output, m);
    } else {
      model.staging().forward(model.context(), *linear_, input, output, m);
    }
  }
  const std::shared_ptr<const Linear<B>>& typed() const noexcept { return linear_; }

 private:
  std::shared_ptr<const Linear<B>> linear_;
};

template <BackendQuantMarlin B>
class ExpertStackModel final : public AnyExpertStack {
 public:
  explicit ExpertStackModel(std::shared_ptr<const MarlinExpertStack<B>> stack)
      : stack_(std::move(stack)) {}

  std::string_view backend() const noexcept override { return B::kName; }
  std::int64_t num_experts() const noexcept override { return stack_->num_experts(); }
  std::int64_t k() const noexcept override { return stack_->k(); }
  std::int64_t n_per_expert() const noexcept override { return stack_->n_per_expert(); }
  Description describe() const override { return stack_->describe(); }
  LinearHandle expert(std::int64_t index) const override {
    return LinearHandle(std::make_shared<LinearModel<B>>(stack_->expert(index)));
  }
  void gemm_phase_batched(AnyContext& context, const ConstMatrixView& input,
                          std::span<const ExpertDispatch> dispatches,
                          const MatrixView& output) const override {
    auto& model = cast<ContextModel, B>(context, "context");
    const ContextUse use(model.busy());
    stack_->gemm_phase_batched(model.context(), input, dispatches, output);
  }
  void gemm_phase_fused(AnyContext& context, const ConstMatrixView& input, const FusedTiles& tiles,
                        const MatrixView& output) const override {
    auto& model = cast<ContextModel, B>(context, "context");
    const ContextUse use(model.busy());
    stack_->gemm_phase_fused(model.context(), input, tiles, output);
  }
  void gemm_phase_batched_host(AnyContext& context, const ConstMatrixView& input,
                               std::span<const ExpertDispatch> dispatches,
                               const MatrixView& output) const override {
    auto& model = cast<ContextModel, B>(context, "context");
    const ContextUse use(model.busy());
    if (model.on_cpu()) {
      stack_->gemm_phase_batched(model.context(), input, dispatches, output);
    } else {
      model.staging().gemm_phase_batched(model.context(), *stack_, input, dispatches, output);
    }
  }
  void gemm_phase_fused_host(AnyContext& context, const ConstMatrixView& input,
                             const FusedTiles& tiles, const MatrixView& output) const override {
    auto& model = cast<ContextModel, B>(context, "context");
    const ContextUse use(model.busy());
    if (model.on_cpu()) {
      stack_->gemm_phase_fused(model.context(), input, tiles, output);
    } else {
      model.staging().gemm_phase_fused(model.context(), *stack_, input, tiles, output);
    }
  }
  const std::shared_ptr<const MarlinExpertStack<B>>& typed() const noexcept { return stack_; }

 private:
  std::shared_ptr<const MarlinExpertStack<B>> stack_;
};

template <BackendQuantMarlin B>
class MoeBlockModel final : public AnyMoeBlock {
 public:
  explicit MoeBlockModel(std::unique_ptr<const MoeBlock<B>> block) : block_(std::move(block)) {}

  std::string_view backend() const noexcept override { return B::kName; }
  std::int64_t hidden_size() const noexcept override { return block_->hidden_size(); }
  std::int64_t num_experts() const noexcept override { return block_->num_experts(); }
  void forward(AnyContext& context, const MoeInput& input,
               const MatrixView& output) const override {
    auto& model = cast<ContextModel, B>(context, "context");
    const ContextUse use(model.busy());
    block_->forward(model.context(), input, output);
  }
  void forward_host(AnyContext& context, const MoeInput& input,
                    const MatrixView& output) const override {
    auto& model = cast<ContextModel, B>(context, "context");
    const ContextUse use(model.busy());
    if (model.on_cpu()) {
      block_->forward(model.context(), input, output);
    } else {
      model.staging().forward(model.context(), *block_, input, output);
    }
  }

 private:
  std::unique_ptr<const MoeBlock<B>> block_;
};

template <BackendQuantMarlin B>
class ContextModel final : public AnyContext {
 public:
  explicit ContextModel(typename B::Context context) : context_(std::move(context)) {}

  std::string_view backend() const noexcept override { return B::kName; }
  Device device() const override { return context_.device(); }
  int threads() const override { return context_.threads(); }
  void* stream() const override {
    if constexpr (requires { context_.stream(); }) {
      return context_.stream();
    } else {
      return nullptr;
    }
  }
  std::int64_t scratch_allocations() const override {
    return context_.scratch_allocations() + staging_.allocations();
  }
  double peak_rate(const LoadOptions& options) override {
    if constexpr (requires { B::peak_rate(context_, options); }) {
      const ContextUse use(busy_);
      return B::peak_rate(context_, options);
    } else {
      return 0.0;
    }
  }

  LinearHandle load_gptq(const GptqTensors& tensors, const GptqSpec& spec,
                         const LoadOptions& options) override {
    const ContextUse use(busy_);
    return LinearHandle(
        std::make_shared<LinearModel<B>>(B::load_gptq(context_, tensors, spec, options)));
  }
  ExpertStackHandle load_gptq_stacked(std::span<const GptqTensors> experts, const GptqSpec& spec,
                                      const LoadOptions& options) override {
    const ContextUse use(busy_);
    return ExpertStackHandle(std::make_shared<ExpertStackModel<B>>(
        B::load_gptq_stacked(context_, experts, spec, options)));
  }
  MoeBlockHandle make_moe_block(const MoeBlockSpec& spec) override {
    const ContextUse use(busy_);
    MoeBlockParts<B> parts{
        .gate_up = cast<ExpertStackModel, B>(spec.gate_up.any(), "gate_up").typed(),
        .down = cast<ExpertStackModel, B>(spec.down.any(), "down").typed(),
        .activation = spec.activation,
        .router_weight = spec.router_weight,
        .shared = std::nullopt,
        .shared_gate = spec.shared_gate};
    if (spec.shared_gate_up.has_value() != spec.shared_down.has_value()) {
      throw Error(ErrorCode::kInvalidArgument,
                  "shared expert: gate_up and down are needed, only one was given");
    }
    if (spec.shared_gate_up) {
      parts.shared = {
          .gate_up = cast<LinearModel, B>(spec.shared_gate_up->any(), "shared gate_up").typed(),
          .down = cast<LinearModel, B>(spec.shared_down->any(), "shared down").typed()};
    }
    return MoeBlockHandle(std::make_shared<MoeBlockModel<B>>(B::make_moe_block(context_, parts)));
  }
  void pregrow_marlin_gather_scratch(std::int64_t elements) override {
    const ContextUse use(busy_);
    B::pregrow_marlin_gather_scratch(context_, elements);
  }
  void route(const ConstMatrixView& logits, const RouteOptions& options, const MatrixView& ids,
             const MatrixView& weights) override {
    const ContextUse use(busy_);
    B::route(context_, logits, options, ids, weights);
  }
  void moe_align_block_size(const ConstMatrixView& topk_ids, int block_size, int num_experts,
                            const ConstArrayView& expert_map, const ArrayView& sorted_token_ids,
                            const ArrayView& expert_ids,
                            const ArrayView& num_tokens_past_padded) override {
    const ContextUse use(busy_);
    B::moe_align_block_size(context_, topk_ids, block_size, num_experts, expert_map,
                            sorted_token_ids, expert_ids, num_tokens_past_padded);
  }
  BufferHandle allocate(DType dtype, std::int64_t size) override {
    const ContextUse use(busy_);
    if (size < 0)
      throw Error(ErrorCode::kInvalidArgument, concat("size: ", size, ", expected at least 0"));
    return BufferHandle(std::make_shared<BufferModel<B>>(B::allocate(context_, dtype, size)));
  }
  void copy(const ConstMatrixView& from, const MatrixView& to) override {
    const ContextUse use(busy_);
    check_copy(from, to, context_.device());
    if (to.rows > 0 && to.cols > 0) B::copy(context_, from, to);
  }
  void synchronise() override {
    const ContextUse use(busy_);
    B::synchronise(context_);
  }
  bool captured() override { return B::captured(context_); }
  std::vector<TunedSchedule> tune(const AnyLinear& linear, std::span<const std::int64_t> rows,
                                  DType dtype) override {
    const ContextUse use(busy_);
    return B::tune(context_, *cast<LinearModel, B>(linear, "linear").typed(), rows, dtype);
  }

  typename B::Context& context() noexcept { return context_; }
  bool on_cpu() const { return context_.device().kind == DeviceKind::kCpu; }
  HostStaging<B>& staging() noexcept { return staging_; }
  std::atomic_flag& busy() noexcept { return busy_; }

 private:
  typename B::Context context_;
  HostStaging<B> staging_;
  std::atomic_flag busy_;
};

}  // namespace detail

/// What the registry knows of a backend.
struct BackendEntry {
  std::string_view name;
  bool (*runs)(DeviceKind);
  BackendInfo (*info)();
  ContextHandle (*open)(Device, const ContextOptions&);
};

/// What the handles and the registry need of a backend beside the trait.
template <class B>
concept RegisteredBackend =
    BackendQuantMarlin<B> &&
    requires(const typename B::Context& context, Device device, const ContextOptions& options) {
      { context.threads() } -> std::same_as<int>;
      { context.scratch_allocations() } -> std::same_as<std::int64_t>;
      { B::runs(device.kind) } -> std::same_as<bool>;
      { B::info() } -> std::same_as<BackendInfo>;
      { B::open(device, options) } -> std::same_as<typename B::Context>;
    };

template <RegisteredBackend B>
BackendEntry erase_backend() {
  return {.name = B::kName,
          .runs = [](DeviceKind kind) { return B::runs(kind); },
          .info = [] { return B::info(); },
          .open =
              [](Device device, const ContextOptions& options) {
                return ContextHandle(
                    std::make_shared<detail::ContextModel<B>>(B::open(device, options)));
              }};
}

}  // namespace marlinq
