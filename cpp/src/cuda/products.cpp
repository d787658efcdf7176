#include "cuda/products.hpp"

#include <algorithm>
#include <cstdint>

#include "core/integers.hpp"
#include "core/matrix_checks.hpp"
#include "cuda/cuda_check.hpp"
#include "cuda/gather.hpp"
#include "cuda/schedule_table.hpp"

namespace marlinq::cuda {
namespace {

std::int64_t size_of(FloatType type) noexcept { return type == FloatType::kF32 ? 4 : 2; }

// Kernels copy 16 bytes of x at a time.
bool is_readable(const FloatMatrix& x, std::int64_t rows, std::int64_t k) noexcept {
  constexpr std::uintptr_t kPiece = 16;
  return x.type != FloatType::kF32 && reinterpret_cast<std::uintptr_t>(x.data) % kPiece == 0 &&
         (rows == 1 || x.row_stride % 8 == 0) && k % 8 == 0;
}

std::int32_t gathered_columns(const WeightView& weight) noexcept { return weight.chunks * 64; }

void order_after_packing(ContextState& state, const PackedExperts& packed) {
  state.captured = state.captured || state.capturing();
  packed.weight().ready.precede(state.stream);
}

void run_segment(ContextState& state, const PackedExperts& packed, const Segment& segment,
                 std::int64_t expert, const FloatMatrix& x, const FloatOutput& y, std::int64_t m) {
  const WeightView weight = expert_view(packed.weight(), segment, expert);
  GemmProblem problem{.weight = weight,
                      .x = x.data,
                      .x_type = multiplied_in(x.type),
                      .x_stride = x.row_stride,
                      .x_columns = weight.k,
                      .y = y.data,
                      .y_type = y.type,
                      .y_stride = y.row_stride,
                      .m = static_cast<std::int32_t>(m)};
  if (weight.source != nullptr || !is_readable(x, m, weight.k)) {
    const std::int32_t columns = gathered_columns(weight);
    void* gathered = state.grow_gather(m * columns);
    gather_rows(x.data, x.type, x.row_stride, problem.m, weight.k, weight.source, gathered,
                problem.x_type, columns, state.limits, state.dependent_launches(), state.stream);
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
    part.y =
        static_cast<unsigned char*>(problem.y) + first * problem.y_stride * size_of(problem.y_type);
    part.m = static_cast<std::int32_t>(std::min(most, m - first));
    const GemmPlan plan =
        plan_rows(part, segment.schedules, packed.arch(), state.limits, packed.invariance());
    packed.arch().launch(part, plan, state.split_scratch(), state.stream);
  }
}

ExpertProblem problem_of(const PackedExperts& packed, const Segment& segment,
                         const ExpertPhase& phase) {
  return {.matrix = {.weight = segment.view,
                     .x = phase.x.data,
                     .x_type = multiplied_in(phase.x.type),
                     .x_stride = phase.x.row_stride,
                     .x_columns = segment.view.k,
                     .y = static_cast<unsigned char*>(phase.y.data) +
                          segment.first_feature * size_of(phase.y.type),
                     .y_type = phase.y.type,
                     .y_stride = phase.y.row_stride,
                     .m = 0},
          .expert_bytes = packed.weight().expert_bytes,
          .num_experts = static_cast<std::int32_t>(packed.num_experts()),
          .tiles = phase.tiles,
          .dispatches = phase.dispatches,
          .top_k = phase.top_k,
          .x_by_slot = phase.x_by_slot,
          .y_by_slot = phase.y_by_slot,
          .weights = phase.weights,
          .weights_stride = phase.weights_stride,
          .weights_bias = phase.weights_bias,
          .activates = phase.activates,
          .activation = phase.activation,
          .follows_product = phase.follows_product};
}

std::int64_t slots_of(const ExpertPhase& phase, std::int32_t tokens) {
  std::int64_t slots = phase.tiles.most_slots;
  for (const ExpertRows& rows : phase.dispatches) slots += round_up(rows.rows, tokens);
  return slots;
}

// Rows in the order of a segment's experts, or of the right type and at the right places.
std::int64_t gathered_rows(const PackedExperts& packed, const Segment& segment,
                           const ExpertPhase& phase, const ExpertPlan& plan) {
  if (segment.view.source != nullptr) return slots_of(phase, plan.tokens);
  return is_readable(phase.x, phase.x_rows, packed.k()) ? 0 : phase.x_rows;
}

void gather_phase(ContextState& state, const PackedExperts& packed, const Segment& segment,
                  const ExpertPhase& phase, const ExpertPlan& plan, ExpertProblem& problem) {
  const std::int64_t rows = gathered_rows(packed, segment, phase, plan);
  if (rows == 0) return;
  const WeightView& weight = segment.view;
  const std::int32_t columns = gathered_columns(weight);
  void* const gathered = state.grow_gather(rows * columns);
  const auto gather = [&](const WeightView& view, std::int64_t first_row, std::int64_t count,
                          std::int64_t slot) {
    gather_rows(static_cast<const unsigned char*>(phase.x.data) +
                    first_row * phase.x.row_stride * size_of(phase.x.type),
                phase.x.type, phase.x.row_stride, static_cast<std::int32_t>(count), weight.k,
                view.source, static_cast<std::uint16_t*>(gathered) + slot * columns,
                problem.matrix.x_type, columns, state.limits, state.dependent_launches(),
                state.stream);
  };
  if (weight.source == nullptr) {
    gather(weight, 0, phase.x_rows, 0);
  } else if (phase.dispatches.empty()) {
    gather_expert_rows({.x = phase.x.data,
                        .x_type = phase.x.type,
                        .x_stride = phase.x.row_stride,
                        .tiles = phase.tiles,
                        .top_k = phase.top_k,
                        .x_by_slot = phase.x_by_slot,
                        .source = weight.source,
                        .expert_bytes = problem.expert_bytes,
                        .num_experts = problem.num_experts,
                        .out = gathered,
                        .columns = columns},
                       state.dependent_launches(), state.stream);
    problem.x_by_slot = true;
  } else {
    std::int64_t slot = 0;
    for (const ExpertRows& part : phase.dispatches) {
      gather(expert_view(packed.weight(), segment, part.expert), part.input_row, part.rows, slot);
      slot += round_up(part.rows, plan.tokens);
    }
    problem.x_by_slot = true;
  }
  problem.matrix.x = gathered;
  problem.matrix.x_stride = columns;
  problem.matrix.x_columns = columns;
}

}  // namespace

void run_rows(ContextState& state, const PackedExperts& packed, std::int64_t expert,
              const ConstMatrixView& input, const MatrixView& output, std::int64_t m) {
  const DeviceGuard guard(state.device);
  order_after_packing(state, packed);
  FloatOutput y = float_output(output);
  for (const Segment& segment : packed.weight().segments) {
    y.data = static_cast<unsigned char*>(output.data) +
             segment.first_feature * size_of(float_output(output).type);
    run_segment(state, packed, segment, expert, float_matrix(input), y, m);
  }
}

bool can_activate(const PackedExperts& packed) {
  // The two halves come in pairs of strips of 16 features.
  return packed.weight().segments.size() == 1 && packed.n() % 64 == 0;
}

std::int64_t gather_need(const ContextState& state, const PackedExperts& packed,
                         const ExpertPhase& phase) {
  std::int64_t need = 0;
  for (const Segment& segment : packed.weight().segments) {
    const ExpertProblem problem = problem_of(packed, segment, phase);
    const ExpertPlan plan = packed.arch().plan_experts(problem, state.limits, packed.invariance());
    need = std::max(need,
                    gathered_rows(packed, segment, phase, plan) * gathered_columns(segment.view));
  }
  return need;
}

bool sorts_ids(const ContextState& state, const PackedExperts& packed, const ExpertPhase& phase,
               std::int64_t ids) {
  const auto& segments = packed.weight().segments;
  return std::all_of(segments.begin(), segments.end(), [&](const Segment& segment) {
    // Rows in the order of a segment's experts are gathered by the lists.
    return segment.view.source == nullptr &&
           ids <= packed.arch().most_sorted_ids(problem_of(packed, segment, phase), state.limits,
                                                packed.invariance());
  });
}

void run_phase(ContextState& state, const PackedExperts& packed, const ExpertPhase& phase) {
  const DeviceGuard guard(state.device);
  order_after_packing(state, packed);
  for (const Segment& segment : packed.weight().segments) {
    ExpertProblem problem = problem_of(packed, segment, phase);
    const ExpertPlan plan = packed.arch().plan_experts(problem, state.limits, packed.invariance());
    gather_phase(state, packed, segment, phase, plan, problem);
    packed.arch().launch_experts(problem, plan, state.limits, state.split_scratch(), state.stream);
  }
}

}  // namespace marlinq::cuda
