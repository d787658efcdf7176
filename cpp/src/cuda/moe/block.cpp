// Tokens are sorted by expert, then gate_up with the activation in its last step, down, and the sum over
// the experts of a token: four launches, or three where the products sort few tokens by themselves, or five where
// gate_up cannot activate. What
// stands between them lies in the order of the sorted tokens, so that down reads its rows one after the other.
#include "cuda/moe/block.hpp"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "core/integers.hpp"
#include "core/marlin_linear.hpp"
#include "core/moe_block_over_phases.hpp"
#include "cuda/cuda_check.hpp"
#include "cuda/moe/align.hpp"
#include "cuda/moe/elementwise.hpp"
#include "cuda/moe/operands.hpp"
#include "cuda/packed.hpp"
#include "cuda/products.hpp"

namespace marlinq::cuda {
namespace {

// Every stack and linear layer of this backend is one of the core's, over a packed weight.
const PackedExperts& packed_of(const MarlinExpertStack<CudaBackend>& stack) {
  return static_cast<const MarlinExpertStackImpl<CudaBackend>&>(stack).packed();
}
const PackedExperts& packed_of(const Linear<CudaBackend>& linear) {
  return static_cast<const MarlinLinear<CudaBackend>&>(linear).packed();
}

void check_device(const PackedExperts& packed, std::string_view name, Device device) {
  if (packed.device() != device) {
    refuse_argument(
        concat(name, ": on ", to_string(packed.device()), ", expected ", to_string(device)));
  }
}

/// Parts of the scratch, one after the other.
class ScratchLayout {
 public:
  explicit ScratchLayout(std::int64_t bytes) : bytes_(bytes) {}

  /// Offset of a new part.
  std::int64_t add(std::int64_t bytes) {
    constexpr std::int64_t kAlignment = 256;
    const std::int64_t at = round_up(bytes_, kAlignment);
    bytes_ = at + bytes;
    return at;
  }
  std::int64_t bytes() const noexcept { return bytes_; }

 private:
  std::int64_t bytes_;
};

/// Two layers with an activation between them, for rows that are there in lists or one after the other.
struct TwoLayers {
  const PackedExperts* gate_up;
  const PackedExperts* down;
  Activation activation;

  std::int64_t inner() const noexcept { return down->k(); }
  bool fused() const { return can_activate(*gate_up); }
};

/// Where a TwoLayers keeps what is between its layers: offsets in the scratch.
struct Between {
  std::int64_t gate_up = 0;  // f32 [rows, 2 inner], where the activation is a step of its own
  std::int64_t hidden = 0;   // [rows, inner]
};

class CudaMoeBlock final : public MoeBlock<CudaBackend> {
 public:
  CudaMoeBlock(ContextState& state, MoeBlockParts<CudaBackend> parts) : parts_(std::move(parts)) {
    check_moe_parts(parts_);
    const Device device{DeviceKind::kCuda, state.device};
    check_device(packed_of(*parts_.gate_up), "gate_up", device);
    check_device(packed_of(*parts_.down), "down", device);
    if (parts_.shared) {
      check_device(packed_of(*parts_.shared->gate_up), "shared gate_up", device);
      check_device(packed_of(*parts_.shared->down), "shared down", device);
    }
    if (parts_.shared_gate.empty()) return;
    const DeviceGuard guard(state.device);
    const RelaxedCapture relaxed;
    const OwnedStream own;
    const auto size = static_cast<std::int64_t>(parts_.shared_gate.size());
    shared_gate_ = CudaBuffer(state.device, DType::kFloat32, size);
    MARLINQ_CUDA_CHECK(cudaMemcpyAsync(shared_gate_.data(), parts_.shared_gate.data(),
                                       static_cast<std::size_t>(size) * sizeof(float),
                                       cudaMemcpyHostToDevice, own.get()));
    MARLINQ_CUDA_CHECK(cudaStreamSynchronize(own.get()));
  }

  std::int64_t hidden_size() const noexcept override { return parts_.gate_up->k(); }
  std::int64_t num_experts() const noexcept override { return parts_.gate_up->num_experts(); }

  void forward(CudaContext& context, const MoeInput& input,
               const MatrixView& output) const override {
    check_context(context.device(), packed_of(*parts_.gate_up).device());
    check_moe_input(input, output, context.device(), hidden_size(), parts_.shared.has_value());
    if (input.x.rows == 0) return;
    check_ids_fit(input);
    ContextState& state = context.state();
    const DeviceGuard guard(state.device);
    Forward(*this, state, input, output).run();
  }

 private:
  // Kernels count ids in 32 bits.
  static void check_ids_fit(const MoeInput& input) {
    constexpr std::int64_t kMost = std::int64_t{1} << 30;
    const std::int64_t ids = input.topk_ids.rows * input.topk_ids.cols;
    if (ids > kMost) refuse_argument(concat("topk_ids: ", ids, " ids, expected at most ", kMost));
  }

  TwoLayers experts() const {
    return {&packed_of(*parts_.gate_up), &packed_of(*parts_.down), parts_.activation};
  }
  TwoLayers shared() const {
    return {&packed_of(*parts_.shared->gate_up), &packed_of(*parts_.shared->down),
            parts_.activation};
  }

  /// One forward: what it needs, where it lies, its launches.
  class Forward {
   public:
    Forward(const CudaMoeBlock& block, ContextState& state, const MoeInput& input,
            const MatrixView& output)
        : block_(block),
          state_(state),
          input_(input),
          output_(output),
          type_(multiplied_in(float_type_of(input.x.dtype))),
          tokens_(input.x.rows),
          ids_(tokens_ * input.topk_ids.cols),
          tile_rows_(choose_tile_rows()),
          most_tiles_(most_expert_tiles(ids_, block.num_experts(), tile_rows_)) {
      lists_ = !products_sort();
    }

    void run() {
      place();
      if (lists_) sort();
      run_layers(block_.experts(), routed(), between_,
                 FloatOutput{at(down_), FloatType::kF32, block_.hidden_size()});
      if (block_.parts_.shared) {
        run_layers(block_.shared(), all_tokens(), shared_between_, shared_output());
      }
      combine_all();
    }

   private:
    std::int32_t choose_tile_rows() const {
      const PackedExperts& packed = packed_of(*block_.parts_.gate_up);
      return packed.arch().tile_rows(tokens_, ids_, block_.num_experts(), packed.invariance());
    }

    // A launch less, where that is worth more than what each block of the products then does.
    bool products_sort() const {
      const TwoLayers layers = block_.experts();
      return tile_rows_ == 8 &&
             sorts_ids(state_, *layers.gate_up, first_layer(layers, routed(), {}), ids_) &&
             sorts_ids(state_, *layers.down, second_layer(layers, routed(), {}, {}), ids_);
    }

    // The products' own gather comes first, since they place it there.
    void place() {
      const std::int64_t gather =
          std::max(gather_need_of(block_.experts(), routed()),
                   block_.parts_.shared ? gather_need_of(block_.shared(), all_tokens()) : 0);
      ScratchLayout layout(gather * 2);
      if (lists_) {
        ids_place_ = layout.add(ids_ * 4);
        experts_place_ = layout.add(most_tiles_ * 4);
        first_place_ = layout.add(most_tiles_ * 4);
        rows_place_ = layout.add(most_tiles_ * 4);
        count_place_ = layout.add(4);
      }
      between_ = place_between(layout, block_.experts(), ids_);
      down_ = layout.add(ids_ * block_.hidden_size() * 4);
      if (block_.parts_.shared) {
        shared_between_ = place_between(layout, block_.shared(), tokens_);
        shared_ = layout.add(tokens_ * block_.hidden_size() * 4);
      }
      scratch_ = static_cast<unsigned char*>(state_.grow_gather(ceil_div(layout.bytes(), 2)));
    }

    static Between place_between(ScratchLayout& layout, const TwoLayers& layers,
                                 std::int64_t rows) {
      Between between;
      between.gate_up = layout.add(layers.fused() ? 0 : rows * layers.inner() * 2 * 4);
      between.hidden = layout.add(rows * layers.inner() * 2);
      return between;
    }

    void* at(std::int64_t offset) const noexcept { return scratch_ + offset; }
    std::int32_t* ints(std::int64_t offset) const noexcept {
      return static_cast<std::int32_t*>(at(offset));
    }

    void sort() {
      sort_by_expert(topk_ids_of(input_.topk_ids), static_cast<std::int32_t>(block_.num_experts()),
                     tile_rows_,
                     {.ids = ints(ids_place_),
                      .experts = ints(experts_place_),
                      .first = ints(first_place_),
                      .rows = ints(rows_place_),
                      .count = ints(count_place_)},
                     state_.dependent_launches(), state_.stream);
    }

    // The rows of x that the first layer takes; before place() without addresses of the scratch.
    ExpertPhase routed() const {
      return {
          .x = float_matrix(input_.x),
          .x_rows = tokens_,
          .tiles = token_tiles(),
          .top_k = static_cast<std::int32_t>(input_.topk_ids.cols),
          .weights = weighs_input() ? static_cast<const float*>(input_.topk_weights.data) : nullptr,
          .weights_stride = input_.topk_weights.row_stride,
          .weights_bias = false};
    }
    TokenTileLists token_tiles() const {
      TokenTileLists tiles{.tile_rows = tile_rows_,
                           .most_tiles = static_cast<std::int32_t>(most_tiles_),
                           .most_slots = ids_,
                           .num_ids = static_cast<std::int32_t>(ids_)};
      if (lists_) {
        tiles.experts = ints(experts_place_);
        tiles.ids = ints(ids_place_);
        tiles.first = ints(first_place_);
        tiles.rows = ints(rows_place_);
        tiles.used = ints(count_place_);
      } else {
        tiles.topk = topk_ids_of(input_.topk_ids);
      }
      return tiles;
    }
    bool weighs_input() const noexcept {
      return block_.parts_.router_weight == RouterWeight::kOnInput;
    }

    ExpertPhase all_tokens() const {
      return {
          .x = float_matrix(input_.x), .x_rows = tokens_, .dispatches = std::span(&token_rows_, 1)};
    }

    ExpertPhase first_layer(const TwoLayers& layers, ExpertPhase phase,
                            const Between& between) const {
      phase.y_by_slot = true;
      phase.activates = layers.fused();
      phase.activation = layers.activation;
      phase.y = layers.fused()
                    ? FloatOutput{at(between.hidden), type_, layers.inner()}
                    : FloatOutput{at(between.gate_up), FloatType::kF32, 2 * layers.inner()};
      return phase;
    }

    ExpertPhase second_layer(const TwoLayers& layers, ExpertPhase phase, const Between& between,
                             const FloatOutput& output) const {
      phase.x = {at(between.hidden), type_, layers.inner()};
      phase.x_rows = phase.dispatches.empty() ? ids_ : tokens_;
      phase.x_by_slot = phase.dispatches.empty();
      phase.tiles.settled = true;  // the first layer's product has waited for them
      phase.follows_product = layers.fused();
      phase.y = output;
      phase.weights = nullptr;
      return phase;
    }

    std::int64_t gather_need_of(const TwoLayers& layers, const ExpertPhase& phase) const {
      return std::max(gather_need(state_, *layers.gate_up, first_layer(layers, phase, {})),
                      gather_need(state_, *layers.down, second_layer(layers, phase, {}, {})));
    }

    void run_layers(const TwoLayers& layers, const ExpertPhase& phase, const Between& between,
                    const FloatOutput& output) {
      run_phase(state_, *layers.gate_up, first_layer(layers, phase, between));
      if (!layers.fused()) {
        const std::int64_t rows = phase.dispatches.empty() ? ids_ : tokens_;
        activate({.gate_up = {at(between.gate_up), FloatType::kF32, 2 * layers.inner()},
                  .hidden = {at(between.hidden), type_, layers.inner()},
                  .rows = static_cast<std::int32_t>(rows),
                  .inner = static_cast<std::int32_t>(layers.inner()),
                  .activation = layers.activation},
                 state_.dependent_launches(), state_.stream);
      }
      run_phase(state_, *layers.down, second_layer(layers, phase, between, output));
    }

    FloatOutput shared_output() const noexcept {
      return {at(shared_), FloatType::kF32, block_.hidden_size()};
    }

    void combine_all() {
      CombineProblem problem{
          .expert_output = {at(down_), FloatType::kF32, block_.hidden_size()},
          .topk_ids = topk_ids_of(input_.topk_ids),
          .num_experts = static_cast<std::int32_t>(block_.num_experts()),
          .settled = true,  // the first product has waited for them
          .topk_weights =
              weighs_input() ? nullptr : static_cast<const float*>(input_.topk_weights.data),
          .topk_weights_stride = input_.topk_weights.row_stride,
          .shared_gate = static_cast<const float*>(block_.shared_gate_.data()),
          .x = float_matrix(input_.x),
          .out = float_output(output_),
          .hidden = static_cast<std::int32_t>(block_.hidden_size())};
      if (input_.residual) problem.residual = float_matrix(*input_.residual);
      if (input_.shared_output) problem.shared = float_matrix(*input_.shared_output);
      if (block_.parts_.shared) {
        const FloatOutput shared = shared_output();
        problem.shared = {shared.data, shared.type, shared.row_stride};
      }
      combine(problem, state_.limits, state_.dependent_launches(), state_.stream);
    }

    const CudaMoeBlock& block_;
    ContextState& state_;
    const MoeInput& input_;
    const MatrixView& output_;
    FloatType type_;
    std::int64_t tokens_;
    std::int64_t ids_;
    std::int32_t tile_rows_;
    std::int64_t most_tiles_;
    bool lists_ = true;  // tokens are sorted by a kernel of their own
    ExpertRows token_rows_{.rows = static_cast<std::int32_t>(tokens_)};
    unsigned char* scratch_ = nullptr;
    std::int64_t ids_place_ = 0, experts_place_ = 0, first_place_ = 0, rows_place_ = 0,
                 count_place_ = 0;
    Between between_, shared_between_;
    std::int64_t down_ = 0, shared_ = 0;
  };

  MoeBlockParts<CudaBackend> parts_;
  CudaBuffer shared_gate_;
};

}  // namespace

std::unique_ptr<MoeBlock<CudaBackend>> make_block(ContextState& state,
                                                  const MoeBlockParts<CudaBackend>& parts) {
  return std::make_unique<CudaMoeBlock>(state, parts);
}

}  // namespace marlinq::cuda
