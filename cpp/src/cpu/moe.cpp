// The elementwise steps of a MoE block on the CPU; intermediate matrices are float32.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/elements.hpp"
#include "core/matrix_checks.hpp"
#include "core/routing.hpp"
#include "cpu/context.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/packed.hpp"
#include "cpu/parallel.hpp"

namespace marlinq {
namespace {

using cpu::ContextState;

// Rows of an expert are multiplied together however many tiles they come in, so the smallest tile
// pads least.
constexpr int kTileRows = 8;
// Where the clamped SwiGLU clamps.
constexpr float kClampedMost = 7.0F;
// Elements that are worth a thread.
constexpr std::int64_t kGrain = 1 << 14;

// Elements of a row that are worked on together: their intermediate values stay in the nearest cache.
constexpr std::int64_t kPiece = 256;

// What the gate is multiplied by, besides `up`: g * sigmoid(argument), or all of gelu.
void gate_arguments(Activation activation, const float* gate, float* arguments,
                    std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float g = gate[i];
    switch (activation) {
      case Activation::kGeluTanh:  // 0.5 (1 + tanh(z)) = sigmoid(2 z)
        arguments[i] = 2.0F * 0.79788456F * (g + 0.044715F * g * g * g);
        break;
      case Activation::kClampedSwiglu:
        arguments[i] = 1.702F * std::min(g, kClampedMost);
        break;
      default:
        arguments[i] = g;
    }
  }
}

void activate(const cpu::IsaKernels& isa, Activation activation, const float* gate, const float* up,
              float* out, std::int64_t count) {
  if (activation == Activation::kGelu) {
    for (std::int64_t i = 0; i < count; ++i) {
      out[i] = 0.5F * gate[i] * (1.0F + std::erf(gate[i] * 0.70710678F)) * up[i];
    }
    return;
  }
  float arguments[kPiece] = {};
  float factors[kPiece] = {};
  gate_arguments(activation, gate, arguments, count);
  isa.sigmoid(arguments, factors, count);
  if (activation == Activation::kClampedSwiglu) {
    for (std::int64_t i = 0; i < count; ++i) {
      const float u = std::clamp(up[i], -kClampedMost, kClampedMost);
      out[i] = (u + 1.0F) * std::min(gate[i], kClampedMost) * factors[i];
    }
  } else {
    for (std::int64_t i = 0; i < count; ++i) out[i] = gate[i] * factors[i] * up[i];
  }
}

template <class F>
void parallel_rows(const ContextState& state, std::int64_t rows, std::int64_t cols, const F& f) {
  cpu::parallel_for(state.threads, rows,
                    std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(cols, 1)), f);
}

float* float_row(const MatrixView& view, std::int64_t row) {
  return static_cast<float*>(view.data) + row * view.row_stride;
}

const float* float_row(const ConstMatrixView& view, std::int64_t row) {
  return static_cast<const float*>(view.data) + row * view.row_stride;
}

// sum[i] += factor * matrix[row, first + i]
void add_scaled(const ConstMatrixView& matrix, float factor, std::int64_t row, std::int64_t first,
                std::int64_t count, float* sum) {
  const std::int64_t start = row * matrix.row_stride + first;
  for (std::int64_t i = 0; i < count; ++i)
    sum[i] += factor * read_float(matrix.data, matrix.dtype, start + i);
}

}  // namespace

MatrixView CpuBackend::moe_scratch(Context& context, MoeScratch slot, std::int64_t rows,
                                   std::int64_t cols) {
  const std::size_t index =
      static_cast<std::size_t>(cpu::Scratch::kMoe) + static_cast<std::size_t>(slot);
  return {.data = context.state().grow(index, rows * cols),
          .dtype = DType::kFloat32,
          .device = context.device(),
          .rows = rows,
          .cols = cols,
          .row_stride = cols};
}

FusedTiles CpuBackend::moe_align(Context& context, const ConstMatrixView& topk_ids,
                                 std::int64_t num_experts) {
  TokenTiles& tiles = context.state().tiles;
  align_tokens(topk_ids, kTileRows, static_cast<int>(num_experts), {}, tiles);
  const auto view = [](const void* data, std::size_t size) {
    return ConstArrayView{
        .data = data, .dtype = DType::kInt32, .size = static_cast<std::int64_t>(size)};
  };
  return {.sorted_token_ids = view(tiles.sorted_token_ids.data(), tiles.sorted_token_ids.size()),
          .expert_ids = view(tiles.expert_ids.data(), tiles.expert_ids.size()),
          .num_tokens_past_padded = view(&tiles.num_tokens_past_padded, 1),
          .block_size = kTileRows,
          .top_k = static_cast<int>(topk_ids.cols),
          .num_tokens = topk_ids.rows,
          .topk_weights = std::nullopt};
}

void CpuBackend::moe_align_block_size(Context& context, const ConstMatrixView& topk_ids,
                                      int block_size, int num_experts,
                                      const ConstArrayView& expert_map,
                                      const ArrayView& sorted_token_ids,
                                      const ArrayView& expert_ids,
                                      const ArrayView& num_tokens_past_padded) {
  check_align(topk_ids, block_size, num_experts, expert_map, sorted_token_ids, expert_ids,
              num_tokens_past_padded, context.device());
  TokenTiles& tiles = context.state().tiles;
  align_tokens(topk_ids, block_size, num_experts,
               {static_cast<const std::int32_t*>(expert_map.data),
                static_cast<std::size_t>(expert_map.size)},
               tiles);
  const auto fill = [](const ArrayView& list, const std::vector<std::int32_t>& values,
                       std::int32_t padding) {
    auto* out = static_cast<std::int32_t*>(list.data);
    std::fill(std::copy(values.begin(), values.end(), out), out + list.size, padding);
  };
  fill(sorted_token_ids, tiles.sorted_token_ids,
       static_cast<std::int32_t>(topk_ids.rows * topk_ids.cols));
  fill(expert_ids, tiles.expert_ids, -1);
  *static_cast<std::int32_t*>(num_tokens_past_padded.data) = tiles.num_tokens_past_padded;
}

void CpuBackend::moe_activate(Context& context, Activation activation,
                              const ConstMatrixView& gate_up, const MatrixView& hidden) {
  const cpu::IsaKernels& isa = cpu::choose_isa({});
  parallel_rows(context.state(), hidden.rows, hidden.cols,
                [&](std::int64_t begin, std::int64_t end) {
                  for (std::int64_t row = begin; row < end; ++row) {
                    const float* gate = float_row(gate_up, row);
                    float* out = float_row(hidden, row);
                    for (std::int64_t i = 0; i < hidden.cols; i += kPiece) {
                      activate(isa, activation, gate + i, gate + hidden.cols + i, out + i,
                               std::min(kPiece, hidden.cols - i));
                    }
                  }
                });
}

void CpuBackend::moe_scale_rows(Context& context, const ConstMatrixView& x,
                                const ConstMatrixView& weights, const MatrixView& scaled) {
  parallel_rows(context.state(), scaled.rows, scaled.cols,
                [&](std::int64_t begin, std::int64_t end) {
                  for (std::int64_t row = begin; row < end; ++row) {
                    const std::int64_t token = row / weights.cols;
                    const float weight = float_row(weights, token)[row % weights.cols];
                    float* out = float_row(scaled, row);
                    for (std::int64_t i = 0; i < scaled.cols; ++i)
                      out[i] = weight * read_float(x.data, x.dtype, token * x.row_stride + i);
                  }
                });
}

void CpuBackend::moe_combine(Context& context, const MoeCombine& combine,
                             const MatrixView& output) {
  const std::int64_t hidden = output.cols;
  const std::int64_t top_k = combine.topk_ids.cols;
  const cpu::IsaKernels& isa = cpu::choose_isa({});
  const cpu::FloatType type = cpu::float_type(output.dtype);
  const auto shared_factor = [&](std::int64_t token) {
    if (combine.shared_gate.empty()) return 1.0F;
    double dot = 0;
    for (std::int64_t i = 0; i < hidden; ++i) {
      const float value =
          read_float(combine.x.data, combine.x.dtype, token * combine.x.row_stride + i);
      dot += static_cast<double>(value) *
             static_cast<double>(combine.shared_gate[static_cast<std::size_t>(i)]);
    }
    return static_cast<float>(1.0 / (1.0 + std::exp(-dot)));
  };
  parallel_rows(context.state(), combine.topk_ids.rows, hidden * top_k,
                [&](std::int64_t begin, std::int64_t end) {
                  for (std::int64_t token = begin; token < end; ++token) {
                    const float factor = combine.shared ? shared_factor(token) : 0.0F;
                    for (std::int64_t first = 0; first < hidden; first += kPiece) {
                      const std::int64_t count = std::min(kPiece, hidden - first);
                      float sum[kPiece] = {};
                      for (std::int64_t slot = 0; slot < top_k; ++slot) {
                        const ConstMatrixView& ids = combine.topk_ids;
                        if (read_integer(ids.data, ids.dtype, token * ids.row_stride + slot) < 0)
                          continue;
                        const float* values =
                            float_row(combine.expert_output, token * top_k + slot) + first;
                        const float weight = combine.topk_weights.data == nullptr
                                                 ? 1.0F
                                                 : float_row(combine.topk_weights, token)[slot];
                        for (std::int64_t i = 0; i < count; ++i) sum[i] += weight * values[i];
                      }
                      if (combine.shared) {
                        add_scaled(*combine.shared, factor, token, first, count, sum);
                      }
                      if (combine.residual) {
                        add_scaled(*combine.residual, 1.0F, token, first, count, sum);
                      }
                      const std::int64_t place = token * output.row_stride + first;
                      isa.from_float(type, sum,
                                     static_cast<std::uint8_t*>(output.data) +
                                         place * static_cast<std::int64_t>(size_of(output.dtype)),
                                     count);
                    }
                  }
                });
}

}  // namespace marlinq
