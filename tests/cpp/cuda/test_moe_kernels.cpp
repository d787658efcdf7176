// The kernels around the products of a MoE block on a real device, against what their headers say:
// tokens sorted by expert, the activation, the combination.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "cuda/context.hpp"
#include "cuda/moe/align.hpp"
#include "cuda/moe/elementwise.hpp"
#include "marlinq/registry.hpp"
#include "support/compare.hpp"
#include "support/device_matrix.hpp"
#include "support/moe_reference.hpp"

namespace marlinq {
namespace {

using test::DeviceMatrix;
using test::Matrix;
using test::Random;

constexpr double kUnwritten = -77;

class MoeKernelsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "no CUDA device";
    context_.emplace(open_context({DeviceKind::kCuda, 0}));
    limits_ = cuda::device_limits(0);
  }

  const ContextHandle& context() const { return *context_; }
  const cuda::DeviceLimits& limits() const { return limits_; }
  bool dependent() const { return limits_.capability >= 90; }
  void* stream() const { return context_->stream(); }

 private:
  std::optional<ContextHandle> context_;
  cuda::DeviceLimits limits_;
};

std::int32_t* integers(const DeviceMatrix& matrix) {
  return static_cast<std::int32_t*>(matrix.view().data);
}

struct SortCase {
  std::int64_t tokens = 1;
  int top_k = 1;
  int experts = 8;
  int max_rows = 16;
};

/// Runs sort_by_expert and compares all lists, and what lies around and behind them.
void check_sort(const ContextHandle& context, const Matrix& ids, const SortCase& c,
                bool dependent) {
  const std::int64_t count = c.tokens * c.top_k;
  std::vector<std::vector<std::int64_t>> members(static_cast<std::size_t>(c.experts));
  for (std::int64_t i = 0; i < count; ++i) {
    const double id = ids.at(i / c.top_k, i % c.top_k);
    if (id >= 0 && id < c.experts) members[static_cast<std::size_t>(id)].push_back(i);
  }
  std::vector<double> sorted;
  std::vector<double> experts;
  std::vector<double> first;
  std::vector<double> rows;
  // Of what is left of each expert, eighth by eighth of max_rows, where these are more than 8.
  const auto add_tiles = [&](bool full, std::int64_t eighth) {
    std::int64_t start = 0;
    for (int e = 0; e < c.experts; ++e) {
      const auto size = static_cast<std::int64_t>(members[static_cast<std::size_t>(e)].size());
      for (std::int64_t at = 0; at < size; at += c.max_rows) {
        const std::int64_t in_tile = std::min<std::int64_t>(c.max_rows, size - at);
        if ((in_tile == c.max_rows) != full) continue;
        const bool mixed = c.max_rows <= 8;
        if (!full && (mixed ? 0 : (in_tile - 1) * 8 / c.max_rows) != eighth) continue;
        experts.push_back(e);
        first.push_back(static_cast<double>(start + at));
        rows.push_back(static_cast<double>(in_tile));
      }
      start += size;
    }
  };
  add_tiles(true, 0);
  for (std::int64_t eighth = 7; eighth >= 0; --eighth) add_tiles(false, eighth);
  for (const auto& of_expert : members) {
    for (const std::int64_t id : of_expert) sorted.push_back(static_cast<double>(id));
  }

  const std::int64_t most = cuda::most_expert_tiles(count, c.experts, c.max_rows);
  ASSERT_LE(static_cast<std::int64_t>(experts.size()), most);
  const auto list = [](std::int64_t size) {
    Matrix matrix(1, size, DType::kInt32);
    matrix.fill(kUnwritten);
    return matrix;
  };
  Matrix out_ids = list(count);
  Matrix out_experts = list(most);
  Matrix out_first = list(most);
  Matrix out_rows = list(most);
  Matrix out_count = list(1);
  {
    const DeviceMatrix in(context, ids);
    const DeviceMatrix device_ids(context, out_ids);
    const DeviceMatrix device_experts(context, out_experts);
    const DeviceMatrix device_first(context, out_first);
    const DeviceMatrix device_rows(context, out_rows);
    const DeviceMatrix device_count(context, out_count);
    cuda::sort_by_expert(cuda::topk_ids_of(in.input()), c.experts, c.max_rows,
                         {.ids = integers(device_ids),
                          .experts = integers(device_experts),
                          .first = integers(device_first),
                          .rows = integers(device_rows),
                          .count = integers(device_count)},
                         dependent, context.stream());
    device_ids.fetch(out_ids);
    device_experts.fetch(out_experts);
    device_first.fetch(out_first);
    device_rows.fetch(out_rows);
    device_count.fetch(out_count);
  }
  EXPECT_EQ(out_count.at(0, 0), static_cast<double>(experts.size()));
  const auto expect_list = [](const Matrix& actual, std::vector<double> expected) {
    expected.resize(static_cast<std::size_t>(actual.cols()), kUnwritten);
    EXPECT_EQ(actual.values(), expected);
    EXPECT_TRUE(actual.guards_intact());
  };
  expect_list(out_ids, sorted);
  expect_list(out_experts, experts);
  expect_list(out_first, first);
  expect_list(out_rows, rows);
  EXPECT_TRUE(out_count.guards_intact());
}

TEST_F(MoeKernelsTest, SortByExpert) {
  Random random(3);
  for (const int experts : {1, 2, 8, 60, 128, 256, 512, 1024}) {
    for (const auto& [tokens, top_k] : std::vector<std::pair<std::int64_t, int>>{
             {0, 4}, {1, 1}, {1, 8}, {3, 2}, {17, 4}, {64, 8}, {257, 5}, {4096, 16}}) {
      for (const int max_rows : {8, 16, 32, 64, 128}) {
        for (const DType dtype : {DType::kInt32, DType::kInt64}) {
          SCOPED_TRACE(::testing::Message() << tokens << " x " << top_k << " ids, " << experts
                                            << " experts, tiles of " << max_rows);
          Matrix ids(tokens, top_k, dtype, random.below(3));
          const int percent_absent = static_cast<int>(random.below(2)) * 20;
          for (std::int64_t t = 0; t < tokens; ++t) {
            for (int s = 0; s < top_k; ++s) {
              const bool absent = random.chance(percent_absent);
              ids.set(t, s, absent ? -1.0 : static_cast<double>(random.below(experts)));
            }
          }
          check_sort(context(), ids,
                     {.tokens = tokens, .top_k = top_k, .experts = experts, .max_rows = max_rows},
                     dependent());
        }
      }
    }
  }
}

TEST_F(MoeKernelsTest, SortOfSkewedAndForeignIds) {
  Random random(4);
  for (const int experts : {1, 60, 1024}) {
    const SortCase c = {.tokens = 1000, .top_k = 8, .experts = experts, .max_rows = 64};
    Matrix ids(c.tokens, c.top_k, DType::kInt64);
    for (const double one : {0.0, static_cast<double>(experts - 1), -1.0}) {
      ids.fill(one);
      check_sort(context(), ids, c, dependent());
    }
    // Out of range is as -1.
    const std::vector<double> foreign = {-2, -1e15, static_cast<double>(experts), 4294967296.0};
    for (std::int64_t t = 0; t < c.tokens; ++t) {
      for (int s = 0; s < c.top_k; ++s) {
        ids.set(
            t, s,
            random.chance(30) ? random.pick(foreign) : static_cast<double>(random.below(experts)));
      }
    }
    check_sort(context(), ids, c, dependent());
  }
}

// More ids than a pass of the warps takes.
TEST_F(MoeKernelsTest, SortOfManyIds) {
  Random random(5);
  const SortCase c = {.tokens = 200000, .top_k = 8, .experts = 256, .max_rows = 32};
  Matrix ids(c.tokens, c.top_k, DType::kInt32);
  for (std::int64_t t = 0; t < c.tokens; ++t) {
    for (int s = 0; s < c.top_k; ++s) ids.set(t, s, static_cast<double>(random.below(256)));
  }
  check_sort(context(), ids, c, dependent());
}

double rounding_of(DType dtype) {
  return dtype == DType::kFloat16    ? test::tolerances::kOutputFloat16
         : dtype == DType::kBFloat16 ? test::tolerances::kOutputBfloat16
                                     : 0;
}

/// Whether a value is what was expected, with float32 arithmetic on terms of this size and one
/// rounding.
bool is_close(double actual, double expected, double magnitude, DType dtype) {
  constexpr double kArithmetic = 2e-6;
  constexpr double kSubnormal = 6e-8;  // of float16
  const double bound =
      rounding_of(dtype) * std::fabs(expected) + kArithmetic * magnitude + kSubnormal;
  return std::fabs(actual - expected) <= bound;
}

TEST_F(MoeKernelsTest, Activate) {
  std::uint64_t seed = 0;
  for (const Activation activation :
       {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kClampedSwiglu}) {
    for (const DType in_dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      for (const DType out_dtype : {DType::kFloat16, DType::kBFloat16}) {
        for (const std::int64_t inner : {1, 7, 40, 768, 2051, 2304}) {
          for (const std::int64_t gap : {0, 1, 8}) {
            SCOPED_TRACE(::testing::Message()
                         << to_string(activation) << ", " << to_string(in_dtype) << " to "
                         << to_string(out_dtype) << ", inner " << inner << ", gap " << gap);
            Matrix gate_up = test::random_matrix(9, 2 * inner, in_dtype, ++seed, gap);
            for (std::int64_t i = 0; i < inner; ++i) gate_up.set(0, i, i % 2 == 0 ? 12.0 : -12.0);
            for (std::int64_t i = 0; i < inner; ++i)
              gate_up.set(1, inner + i, i % 2 == 0 ? 30.0 : -30.0);
            Matrix hidden(9, inner, out_dtype, gap);
            {
              const DeviceMatrix in(context(), gate_up);
              const DeviceMatrix out(context(), hidden);
              cuda::activate({.gate_up = cuda::float_matrix(in.input()),
                              .hidden = cuda::float_output(out.view()),
                              .rows = 9,
                              .inner = static_cast<std::int32_t>(inner),
                              .activation = activation},
                             dependent(), stream());
              out.fetch(hidden);
            }
            EXPECT_TRUE(hidden.guards_intact());
            for (std::int64_t row = 0; row < 9; ++row) {
              for (std::int64_t i = 0; i < inner; ++i) {
                const double g = gate_up.at(row, i);
                const double u = gate_up.at(row, inner + i);
                ASSERT_TRUE(is_close(hidden.at(row, i), test::activation_of(activation, g, u),
                                     std::fabs(g) * (std::fabs(u) + 1), out_dtype))
                    << "row " << row << ", column " << i << ": " << hidden.at(row, i);
              }
            }
          }
        }
      }
    }
  }
}

TEST_F(MoeKernelsTest, NoRows) {
  cuda::activate({}, dependent(), stream());
  cuda::combine({}, limits(), dependent(), stream());
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  EXPECT_NO_THROW(context().synchronise());
}

struct CombineCase {
  std::int64_t tokens = 3;
  int top_k = 4;
  std::int64_t hidden = 64;
  DType expert_dtype = DType::kFloat32;
  DType out_dtype = DType::kFloat16;
  bool weighted = true;
  bool shared = false;
  bool gated = false;
  bool residual = false;
  std::int64_t gap = 0;
};

constexpr int kCombineExperts = 5;

/// Operands of combine() on the host, and the result.
struct Combined {
  Combined(const CombineCase& c, std::uint64_t seed)
      : random(seed),
        experts(test::random_matrix(c.tokens * c.top_k, c.hidden, c.expert_dtype, seed, c.gap)),
        ids(test::random_topk_ids(c.tokens, c.top_k, kCombineExperts,
                                  seed % 2 == 0 ? DType::kInt32 : DType::kInt64, 20, random,
                                  c.gap)),
        weights(test::random_topk_weights(c.tokens, c.top_k, random, c.gap)),
        shared(test::random_matrix(c.tokens, c.hidden, DType::kBFloat16, seed + 1, c.gap)),
        x(test::random_matrix(c.tokens, c.hidden, DType::kFloat16, seed + 2, c.gap)),
        gate(test::random_matrix(1, c.hidden, DType::kFloat32, seed + 3)),
        residual(test::random_matrix(c.tokens, c.hidden, c.out_dtype, seed + 4, c.gap)),
        out(c.tokens, c.hidden, c.out_dtype, c.gap) {
    ids.set(0, 0, kCombineExperts);
    const double scale = 1 / std::sqrt(static_cast<double>(c.hidden));
    for (std::int64_t i = 0; i < c.hidden; ++i) gate.set(0, i, gate.at(0, i) * scale);
    for (std::int64_t t = 0; t < c.tokens; ++t) {
      for (int s = 0; s < c.top_k; ++s) {
        if (is_present(t, s)) continue;
        // A row that must not be read, with a weight that must not count.
        weights.set(t, s, std::numeric_limits<double>::infinity());
        for (std::int64_t i = 0; i < c.hidden; ++i) {
          experts.set(t * c.top_k + s, i, std::numeric_limits<double>::quiet_NaN());
        }
      }
    }
  }

  bool is_present(std::int64_t token, int slot) const {
    return ids.at(token, slot) >= 0 && ids.at(token, slot) < kCombineExperts;
  }

  void run(const CombineCase& c, const ContextHandle& context, const cuda::DeviceLimits& limits,
           bool dependent) {
    const DeviceMatrix device_experts(context, experts);
    const DeviceMatrix device_ids(context, ids);
    const DeviceMatrix device_weights(context, weights);
    const DeviceMatrix device_shared(context, shared);
    const DeviceMatrix device_x(context, x);
    const DeviceMatrix device_gate(context, gate);
    const DeviceMatrix device_residual(context, residual);
    const DeviceMatrix device_out(context, out);
    cuda::CombineProblem problem{.expert_output = cuda::float_matrix(device_experts.input()),
                                 .topk_ids = cuda::topk_ids_of(device_ids.input()),
                                 .num_experts = kCombineExperts,
                                 .out = cuda::float_output(device_out.view()),
                                 .hidden = static_cast<std::int32_t>(c.hidden)};
    if (c.weighted) {
      problem.topk_weights = static_cast<const float*>(device_weights.input().data);
      problem.topk_weights_stride = device_weights.input().row_stride;
    }
    if (c.shared) problem.shared = cuda::float_matrix(device_shared.input());
    if (c.gated) {
      problem.shared_gate = static_cast<const float*>(device_gate.input().data);
      problem.x = cuda::float_matrix(device_x.input());
    }
    if (c.residual) problem.residual = cuda::float_matrix(device_residual.input());
    cuda::combine(problem, limits, dependent, context.stream());
    device_out.fetch(out);
  }

  void check(const CombineCase& c) const {
    EXPECT_TRUE(out.guards_intact());
    for (std::int64_t t = 0; t < c.tokens; ++t) {
      double dot = 0;
      for (std::int64_t i = 0; i < c.hidden; ++i) dot += x.at(t, i) * gate.at(0, i);
      const double factor = c.gated ? 1 / (1 + std::exp(-dot)) : 1;
      for (std::int64_t i = 0; i < c.hidden; ++i) {
        double sum = 0;
        double magnitude = 0;
        const auto add = [&](double term) {
          sum += term;
          magnitude += std::fabs(term);
        };
        for (int s = 0; s < c.top_k; ++s) {
          if (!is_present(t, s)) continue;
          add((c.weighted ? weights.at(t, s) : 1) * experts.at(t * c.top_k + s, i));
        }
        if (c.shared) add(factor * shared.at(t, i));
        if (c.residual) add(residual.at(t, i));
        ASSERT_TRUE(is_close(out.at(t, i), sum, magnitude, c.out_dtype))
            << "token " << t << ", column " << i << ": " << out.at(t, i) << ", expected " << sum;
      }
    }
  }

  Random random;
  Matrix experts;
  Matrix ids;
  Matrix weights;
  Matrix shared;
  Matrix x;
  Matrix gate;
  Matrix residual;
  Matrix out;
};

TEST_F(MoeKernelsTest, Combine) {
  const std::vector<std::int64_t> tokens = {1, 3, 600};
  const std::vector<int> top_k = {1, 2, 5, 8, 16};
  const std::vector<std::int64_t> hidden = {1, 60, 1024, 2051, 7168};
  const std::vector<DType> dtypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  const std::vector<std::int64_t> gaps = {0, 3, 8};
  std::uint64_t seed = 0;
  for (const std::vector<int>& pick : test::pairwise_cover({3, 5, 5, 3, 3, 2, 2, 2, 2, 3}, 6)) {
    const auto at = [&pick](int axis) {
      return static_cast<std::size_t>(pick[static_cast<std::size_t>(axis)]);
    };
    CombineCase c{.tokens = tokens[at(0)],
                  .top_k = top_k[at(1)],
                  .hidden = hidden[at(2)],
                  .expert_dtype = dtypes[at(3)],
                  .out_dtype = dtypes[at(4)],
                  .weighted = at(5) == 1,
                  .shared = at(6) == 1,
                  .gated = at(7) == 1,
                  .residual = at(8) == 1,
                  .gap = gaps[at(9)]};
    SCOPED_TRACE(::testing::Message()
                 << c.tokens << " tokens, top " << c.top_k << ", hidden " << c.hidden << ", gap "
                 << c.gap << ", " << to_string(c.expert_dtype) << " to " << to_string(c.out_dtype)
                 << ", weighted " << c.weighted << ", shared " << c.shared << ", gated " << c.gated
                 << ", residual " << c.residual);
    Combined combined(c, ++seed);
    combined.run(c, context(), limits(), dependent());
    combined.check(c);
  }
}

// A token alone is cut into more blocks than a token among many, whose rows may be read in several pieces, and
// gives the same bits.
TEST_F(MoeKernelsTest, CombineIsBatchInvariant) {
  std::uint64_t seed = 50;
  for (CombineCase c : std::vector<CombineCase>{{.top_k = 8, .hidden = 2048, .gated = true},
                                                {.top_k = 4, .hidden = 1032},
                                                {.top_k = 3, .hidden = 1031, .gap = 3},
                                                {.top_k = 2, .hidden = 2056, .gated = true},
                                                {.top_k = 2, .hidden = 1030, .gap = 2},
                                                {.top_k = 1, .hidden = 1027}}) {
    SCOPED_TRACE(::testing::Message()
                 << "top " << c.top_k << ", hidden " << c.hidden << ", gated " << c.gated);
    c.tokens = 600;
    c.shared = c.residual = true;
    Combined all(c, ++seed);
    all.run(c, context(), limits(), dependent());
    all.check(c);
    CombineCase alone = c;
    alone.tokens = 1;
    Combined one(alone, ++seed);
    constexpr std::int64_t kToken = 123;
    const auto copy_rows = [](const Matrix& from, Matrix& to) {
      for (std::int64_t row = 0; row < to.rows(); ++row) {
        for (std::int64_t i = 0; i < to.cols(); ++i) {
          to.set(row, i, from.at(kToken * to.rows() + row, i));
        }
      }
    };
    copy_rows(all.experts, one.experts);
    copy_rows(all.ids, one.ids);
    copy_rows(all.weights, one.weights);
    copy_rows(all.shared, one.shared);
    copy_rows(all.x, one.x);
    copy_rows(all.residual, one.residual);
    for (std::int64_t i = 0; i < c.hidden; ++i) one.gate.set(0, i, all.gate.at(0, i));
    one.run(alone, context(), limits(), dependent());
    EXPECT_EQ(one.out.row_bytes(0, 1), all.out.row_bytes(kToken, 1));
  }
}

TEST_F(MoeKernelsTest, TheResidualMayBeTheOutput) {
  const CombineCase c = {.tokens = 3, .top_k = 2, .hidden = 2048, .residual = true};
  Combined separate(c, 60);
  separate.run(c, context(), limits(), dependent());
  Combined in_place(c, 60);
  {
    const DeviceMatrix experts(context(), in_place.experts);
    const DeviceMatrix ids(context(), in_place.ids);
    const DeviceMatrix weights(context(), in_place.weights);
    const DeviceMatrix out(context(), in_place.residual);
    cuda::combine({.expert_output = cuda::float_matrix(experts.input()),
                   .topk_ids = cuda::topk_ids_of(ids.input()),
                   .num_experts = kCombineExperts,
                   .topk_weights = static_cast<const float*>(weights.input().data),
                   .topk_weights_stride = weights.input().row_stride,
                   .residual = cuda::float_matrix(out.input()),
                   .out = cuda::float_output(out.view()),
                   .hidden = 2048},
                  limits(), dependent(), stream());
    out.fetch(in_place.out);
  }
  EXPECT_EQ(in_place.out.row_bytes(0, 3), separate.out.row_bytes(0, 3));
}

}  // namespace
}  // namespace marlinq
