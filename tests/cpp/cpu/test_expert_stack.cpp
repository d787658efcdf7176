// The two phases of an expert stack on every kernel.
#include <gtest/gtest.h>

#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <vector>

#include "marlinq/routing.hpp"
#include "support/compare.hpp"
#include "support/cpu_kernels.hpp"
#include "support/moe_reference.hpp"

namespace marlinq {
namespace {

using test::Dense;
using test::expect_refused;
using test::Experts;
using test::Layer;
using test::LayerOptions;
using test::make_experts;
using test::Matrix;
using test::Order;
using test::Product;
using test::Random;
using test::Zeros;

using StackPtr = std::shared_ptr<MarlinExpertStack<CpuBackend>>;

constexpr std::int64_t kExperts = 7;

LayerOptions expert_options() {
  return {.bits = 4,
          .k = 100,
          .n = 40,
          .group_size = 32,
          .zeros = Zeros::kAsymmetricV1,
          .order = Order::kActOrder,
          .bias = DType::kFloat16};
}

ConstArrayView array(const std::vector<std::int32_t>& values) {
  return {.data = values.data(),
          .dtype = DType::kInt32,
          .size = static_cast<std::int64_t>(values.size())};
}

// Tile lists and the view of them.
struct Tiles {
  TokenTiles lists;
  std::vector<std::int32_t> count;

  Tiles(const Matrix& ids, int block_size, int experts, std::span<const std::int32_t> map = {})
      : lists(moe_align_block_size(ids.input(), block_size, experts, map)),
        count{lists.num_tokens_past_padded} {
    view = {.sorted_token_ids = array(lists.sorted_token_ids),
            .expert_ids = array(lists.expert_ids),
            .num_tokens_past_padded = array(count),
            .block_size = block_size,
            .top_k = static_cast<int>(ids.cols()),
            .num_tokens = ids.rows(),
            .topk_weights = std::nullopt};
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  FusedTiles view;
};

class ExpertStackTest : public test::CpuKernelTest {
 protected:
  StackPtr load(const Experts& experts) {
    return CpuBackend::load_gptq_stacked(context_, experts.tensors(), experts.spec(), options());
  }
  CpuBackend::Context context_{2};
};

INSTANTIATE_TEST_SUITE_P(Kernels, ExpertStackTest, ::testing::ValuesIn(test::cpu_kernels()),
                         test::kernel_name);

// What each output row of the fused phase must be.
Product fused_reference(const std::vector<Dense>& dense, const Matrix& x, const Matrix& ids,
                        const std::vector<std::int32_t>& map, const Matrix* weights) {
  Product all{.m = ids.rows() * ids.cols(), .n = dense.front().n, .y = {}, .energy = {}};
  const std::vector<double> values = x.values();
  for (std::int64_t id = 0; id < all.m; ++id) {
    const std::int64_t token = id / ids.cols();
    auto expert = static_cast<std::int64_t>(ids.at(token, id % ids.cols()));
    if (expert >= 0 && !map.empty()) expert = map[static_cast<std::size_t>(expert)];
    if (expert < 0) {
      all.y.insert(all.y.end(), static_cast<std::size_t>(all.n), 0.0);
      all.energy.push_back(0);
      continue;
    }
    const std::vector<double> row(values.begin() + token * x.cols(),
                                  values.begin() + (token + 1) * x.cols());
    Product one = test::multiply(row, 1, dense[static_cast<std::size_t>(expert)]);
    const double weight = weights == nullptr ? 1.0 : weights->at(token, id % ids.cols());
    for (const double y : one.y) all.y.push_back(y * weight);
    all.energy.push_back(one.energy[0] * weight * weight);
  }
  return all;
}

TEST_P(ExpertStackTest, FusedPhase) {
  std::uint64_t seed = 50;
  for (const int parts : {1, 2}) {
    for (const int bits : {4, 8}) {
      LayerOptions options = expert_options();
      options.bits = bits;
      const Experts experts = make_experts(kExperts, parts, options);
      const std::vector<Dense> dense = experts.dense();
      const StackPtr stack = load(experts);
      EXPECT_EQ(stack->describe().kernel, GetParam().name);
      EXPECT_EQ(stack->num_experts(), kExperts);
      EXPECT_EQ(stack->k(), 100);
      EXPECT_EQ(stack->n_per_expert(), 40 * parts);
      for (const int block_size : {8, 16, 32, 48, 64}) {
        for (const int top_k : {1, 2, 4}) {
          for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
            SCOPED_TRACE(::testing::Message()
                         << parts << " parts, " << bits << " bits, block " << block_size << ", top "
                         << top_k << ", " << to_string(dtype) << ", seed " << seed);
            Random random(++seed);
            const std::int64_t tokens = 1 + random.below(90);
            const Matrix ids =
                test::random_topk_ids(tokens, top_k, kExperts, DType::kInt32, 15, random);
            const Matrix x = test::random_matrix(tokens, 100, dtype, ++seed, 3);
            const Matrix weights = test::random_topk_weights(tokens, top_k, random);
            Tiles tiles(ids, block_size, kExperts);
            const bool weighted = seed % 2 == 0;
            if (weighted) {
              tiles.view.topk_weights = {
                  .data = weights.data(), .dtype = DType::kFloat32, .size = tokens * top_k};
            }
            Matrix out(tokens * top_k, stack->n_per_expert(),
                       seed % 3 == 0 ? DType::kFloat32 : dtype,
                       5);  // not zeroed beforehand: guard bytes everywhere
            stack->gemm_phase_fused(context_, x.input(), tiles.view, out.view());
            ASSERT_TRUE(test::matches(
                out, fused_reference(dense, x, ids, {}, weighted ? &weights : nullptr), out.rows(),
                bound()));
          }
        }
      }
    }
  }
}

TEST_P(ExpertStackTest, FusedPhaseOfAPartOfTheExperts) {
  const Experts experts = make_experts(3, 1, expert_options());
  const std::vector<Dense> dense = experts.dense();
  const StackPtr stack = load(experts);
  const std::vector<std::int32_t> map = {-1, 2, -1, 0, -1, 1, -1, -1};  // eight experts, three here
  Random random(4);
  const Matrix ids = test::random_topk_ids(50, 4, 8, DType::kInt64, 10, random);
  const Matrix x = test::random_matrix(50, 100, DType::kFloat32, 5);
  const Tiles tiles(ids, 16, 8, map);
  Matrix out(200, 40, DType::kFloat32);
  stack->gemm_phase_fused(context_, x.input(), tiles.view, out.view());
  const Product expected = fused_reference(dense, x, ids, map, nullptr);
  ASSERT_TRUE(test::matches(out, expected, 200, bound()));
  for (std::int64_t id = 0; id < 200; ++id) {  // rows that are not here are zero, not merely small
    if (expected.energy[static_cast<std::size_t>(id)] > 0) continue;
    for (std::int64_t n = 0; n < 40; ++n) ASSERT_EQ(out.at(id, n), 0.0);
  }
}

TEST_P(ExpertStackTest, FusedPhaseWithAllTokensOnOneExpertOrNone) {
  const Experts experts = make_experts(kExperts, 1, expert_options());
  const StackPtr stack = load(experts);
  for (const double id : {0.0, 6.0, -1.0}) {
    Matrix ids(65, 2, DType::kInt32);
    ids.fill(id);
    const Matrix x = test::random_matrix(65, 100, DType::kFloat32, 6);
    const Tiles tiles(ids, 64, kExperts);
    Matrix out(130, 40, DType::kFloat32);
    stack->gemm_phase_fused(context_, x.input(), tiles.view, out.view());
    EXPECT_TRUE(
        test::matches(out, fused_reference(experts.dense(), x, ids, {}, nullptr), 130, bound()));
  }
}

// Tiles in another order, padding between the tokens, and lists longer than what counts.
TEST_P(ExpertStackTest, FusedPhaseOfTilesInAnyOrder) {
  const Experts experts = make_experts(3, 1, expert_options());
  const std::vector<Dense> dense = experts.dense();
  const StackPtr stack = load(experts);
  const std::vector<std::int32_t> sorted = {9, 4, 9, 2, 9, 9, 9, 9,   // expert 2
                                            0, 9, 9, 9, 9, 9, 9, 77,  // expert 0
                                            1, 9, 9, 9, 9, 9, 9, 3,   // expert 2 again
                                            5, 5, 5, 5, 5, 5, 5, 5};  // does not count
  const std::vector<std::int32_t> expert_ids = {2, 0, 2, 1};
  const std::vector<std::int32_t> count = {24};
  const Matrix x = test::random_matrix(9, 100, DType::kFloat32, 7);
  const FusedTiles tiles{.sorted_token_ids = array(sorted),
                         .expert_ids = array(expert_ids),
                         .num_tokens_past_padded = array(count),
                         .block_size = 8,
                         .top_k = 1,
                         .num_tokens = 9,
                         .topk_weights = std::nullopt};
  Matrix out(9, 40, DType::kFloat32);
  stack->gemm_phase_fused(context_, x.input(), tiles, out.view());
  EXPECT_FALSE(out.guards_intact(0));
  const std::vector<int> expert_of = {0, 2, 2, 2, 2};
  const std::vector<double> values = x.values();
  for (std::int64_t id = 0; id < 5; ++id) {
    const std::vector<double> row(values.begin() + id * 100, values.begin() + (id + 1) * 100);
    const Product one = test::multiply(
        row, 1, dense[static_cast<std::size_t>(expert_of[static_cast<std::size_t>(id)])]);
    std::vector<double> actual;
    for (std::int64_t n = 0; n < 40; ++n) actual.push_back(out.at(id, n));
    EXPECT_TRUE(test::within(actual, one.y, one.energy[0], 40, bound())) << "id " << id;
  }
  EXPECT_TRUE(out.guards_intact(5));  // ids that no tile names are left alone
}

TEST_P(ExpertStackTest, FusedPhaseOfNoTokens) {
  const StackPtr stack = load(make_experts(2, 1, expert_options()));
  const Tiles tiles(Matrix(0, 2, DType::kInt32), 16, 2);
  EXPECT_NO_THROW(stack->gemm_phase_fused(context_, {.cols = 100}, tiles.view, {.cols = 40}));
}

TEST_P(ExpertStackTest, BatchedPhase) {
  for (const int parts : {1, 2}) {
    const Experts experts = make_experts(kExperts, parts, expert_options());
    const std::vector<Dense> dense = experts.dense();
    const StackPtr stack = load(experts);
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      const Matrix x = test::random_matrix(200, 100, dtype, 11, 1);
      const std::vector<double> values = x.values();
      // Any order, input rows shared and skipped, dispatches of no rows, an expert twice and others
      // not at all.
      const std::vector<ExpertDispatch> dispatches = {
          {.expert = 5, .input_row = 3, .output_row = 150, .rows = 20},
          {.expert = 0, .input_row = 0, .output_row = 7, .rows = 70},
          {.expert = 2, .input_row = 200, .output_row = 180, .rows = 0},
          {.expert = 5, .input_row = 100, .output_row = 100, .rows = 1},
          {.expert = 1, .input_row = 0, .output_row = 0, .rows = 7},
          {.expert = 6, .input_row = 199, .output_row = 179, .rows = 1},
          {.expert = 0, .input_row = 30, .output_row = 101, .rows = 17}};
      Matrix out(180, stack->n_per_expert(), dtype, 2);
      stack->gemm_phase_batched(context_, x.input(), dispatches, out.view());
      std::vector<bool> written(180, false);
      for (const ExpertDispatch& d : dispatches) {
        const std::vector<double> rows(values.begin() + d.input_row * 100,
                                       values.begin() + (d.input_row + d.rows) * 100);
        const Product expected =
            test::multiply(rows, d.rows, dense[static_cast<std::size_t>(d.expert)]);
        std::vector<double> actual;
        double energy = 0;
        for (std::int64_t i = 0; i < d.rows; ++i) {
          written[static_cast<std::size_t>(d.output_row + i)] = true;
          energy += expected.energy[static_cast<std::size_t>(i)];
          for (std::int64_t n = 0; n < out.cols(); ++n)
            actual.push_back(out.at(d.output_row + i, n));
        }
        EXPECT_TRUE(
            test::within(actual, expected.y, energy, out.cols(), test::bound_for(dtype, bound())))
            << "expert " << d.expert << ", " << d.rows << " rows";
      }
      EXPECT_TRUE(out.guards_intact());
      const Matrix untouched(1, out.cols(), dtype);
      for (std::int64_t row = 0; row < 180; ++row) {
        if (!written[static_cast<std::size_t>(row)]) {
          EXPECT_EQ(out.row_bytes(row, 1), untouched.row_bytes(0, 1)) << "row " << row;
        }
      }
    }
  }
}

TEST_P(ExpertStackTest, BatchedPhaseOfNothing) {
  const StackPtr stack = load(make_experts(2, 1, expert_options()));
  Matrix out(3, 40, DType::kFloat32);
  const Matrix x = test::random_matrix(3, 100, DType::kFloat32, 1);
  stack->gemm_phase_batched(context_, x.input(), {}, out.view());
  const ExpertDispatch nothing{.expert = 1, .rows = 0};
  stack->gemm_phase_batched(context_, x.input(), {&nothing, 1}, out.view());
  EXPECT_TRUE(out.guards_intact(0));
}

// Both phases and the view of one expert give the same bits, and so do any threads.
TEST_P(ExpertStackTest, PhasesViewsAndThreadsAgreeBitForBit) {
  const Experts experts = make_experts(kExperts, 2, expert_options());
  const StackPtr stack = load(experts);
  const Matrix x = test::random_matrix(31, 100, DType::kFloat16, 3);
  for (std::int64_t e = 0; e < kExperts; ++e) {
    const auto view = stack->expert(e);
    EXPECT_EQ(view->in_features(), 100);
    EXPECT_EQ(view->out_features(), 80);
    Matrix single(31, 80, DType::kFloat16);
    view->forward(context_, x.input(), single.view(), 31);

    CpuBackend::Context five(5);
    Matrix batched(31, 80, DType::kFloat16);
    const ExpertDispatch all{.expert = static_cast<std::int32_t>(e), .rows = 31};
    stack->gemm_phase_batched(five, x.input(), {&all, 1}, batched.view());
    EXPECT_EQ(batched.row_bytes(0, 31), single.row_bytes(0, 31)) << "expert " << e;

    Matrix ids(31, 1, DType::kInt32);
    ids.fill(static_cast<double>(e));
    const Tiles tiles(ids, 8, kExperts);
    Matrix fused(31, 80, DType::kFloat16);
    stack->gemm_phase_fused(context_, x.input(), tiles.view, fused.view());
    EXPECT_EQ(fused.row_bytes(0, 31), single.row_bytes(0, 31)) << "expert " << e;

    const auto alone =
        CpuBackend::load_gptq(context_, test::fused(experts.parts[static_cast<std::size_t>(e)]),
                              experts.spec(), options());
    Matrix same(31, 80, DType::kFloat16);
    alone->forward(context_, x.input(), same.view(), 31);
    EXPECT_EQ(same.row_bytes(0, 31), single.row_bytes(0, 31)) << "expert " << e;
  }
}

// A view shares the stack's memory and keeps it alive.
TEST(ExpertViewTest, OutlivesTheStack) {
  const Experts experts = make_experts(2, 1, expert_options());
  CpuBackend::Context context(1);
  auto stack = CpuBackend::load_gptq_stacked(context, experts.tensors(), experts.spec(),
                                             {.compute = Compute::kFloat32});
  const auto view = stack->expert(1);
  stack.reset();
  const Matrix x = test::random_matrix(8, 100, DType::kFloat32, 3);
  Matrix out(8, 40, DType::kFloat32);
  view->forward(context, x.input(), out.view(), 8);
  EXPECT_TRUE(test::matches(out, test::multiply(x.values(), 8, experts.dense()[1]), 8));
}

// --- refusals ---

class StackRefusalTest : public ::testing::Test {
 protected:
  void load_refused(std::initializer_list<std::string_view> parts,
                    const std::vector<GptqTensors>& tensors) {
    expect_refused(parts, [&] { CpuBackend::load_gptq_stacked(context, tensors, experts.spec()); });
  }
  CpuBackend::Context context{1};
  Experts experts = make_experts(3, 2, expert_options());
};

TEST_F(StackRefusalTest, ExpertsThatDoNotFitTogether) {
  load_refused({"experts: none", "at least one"}, {});
  std::vector<GptqTensors> tensors = experts.tensors();
  tensors[2].modules.pop_back();
  load_refused({"experts[2]: 1 fused modules", "expected 2"}, tensors);

  const auto replaced = [&](const LayerOptions& options) {
    static std::vector<Layer> kept;
    kept.reserve(64);
    kept.push_back(test::make_layer(options));
    std::vector<GptqTensors> all = experts.tensors();
    all[1].modules[1] = kept.back().module();
    return all;
  };
  LayerOptions options = expert_options();
  options.name = "experts.1.up";
  options.n = 48;
  load_refused({"experts[1] experts.1.up", "n = 48", "expected 40"}, replaced(options));
  options = expert_options();
  options.name = "experts.1.up";
  options.scales = DType::kBFloat16;
  load_refused({"experts[1] experts.1.up", "bfloat16", "float16 as in experts[0]"},
               replaced(options));
  options = expert_options();
  options.name = "experts.1.up";
  options.bias = std::nullopt;
  load_refused({"experts[1] experts.1.up", "no bias"}, replaced(options));
  options = expert_options();
  options.name = "experts.1.up";
  options.k = 104;
  load_refused({"experts.1.up.", "expected"}, replaced(options));
}

TEST_F(StackRefusalTest, ExpertIndices) {
  const auto stack = CpuBackend::load_gptq_stacked(context, experts.tensors(), experts.spec());
  for (const std::int64_t index :
       {std::int64_t{-1}, std::int64_t{3}, std::numeric_limits<std::int64_t>::max()}) {
    expect_refused({"expert: " + std::to_string(index), "expected 0 to 2"},
                   [&] { stack->expert(index); });
  }
}

TEST_F(StackRefusalTest, Dispatches) {
  const auto stack = CpuBackend::load_gptq_stacked(context, experts.tensors(), experts.spec());
  const Matrix x = test::random_matrix(10, 100, DType::kFloat32, 1);
  Matrix out(12, 80, DType::kFloat32);
  const auto refused = [&](std::initializer_list<std::string_view> parts, ExpertDispatch bad) {
    const std::vector<ExpertDispatch> list = {{.expert = 0, .rows = 1}, bad};
    expect_refused(parts, [&] { stack->gemm_phase_batched(context, x.input(), list, out.view()); });
    EXPECT_TRUE(out.guards_intact(0)) << "something ran before the refusal";
  };
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  refused({"dispatches[1]: expert 3", "expected 0 to 2"}, {.expert = 3, .rows = 1});
  refused({"dispatches[1]: expert -1"}, {.expert = -1, .rows = 1});
  refused({"dispatches[1]: input rows 9 + 2 of 10"}, {.input_row = 9, .rows = 2});
  refused({"dispatches[1]: input rows -1 + 1"}, {.input_row = -1, .rows = 1});
  refused({"dispatches[1]: output rows 12 + 1 of 12"}, {.output_row = 12, .rows = 1});
  refused({"dispatches[1]: output rows -5"}, {.output_row = -5, .rows = 1});
  refused({"dispatches[1]: input rows 0 + -1"}, {.rows = -1});
  refused({"dispatches[1]"}, {.input_row = 1, .rows = kMost});
  refused({"dispatches[1]"}, {.input_row = kMost, .rows = kMost});
}

TEST_F(StackRefusalTest, Tiles) {
  const auto stack = CpuBackend::load_gptq_stacked(context, experts.tensors(), experts.spec());
  const Matrix x = test::random_matrix(4, 100, DType::kFloat32, 1);
  Matrix out(8, 80, DType::kFloat32);
  Matrix ids(4, 2, DType::kInt32);
  ids.fill(1.0);
  Tiles tiles(ids, 16, 3);
  const auto refused = [&](std::initializer_list<std::string_view> parts, auto change) {
    FusedTiles bad = tiles.view;
    change(bad);
    expect_refused(parts, [&] { stack->gemm_phase_fused(context, x.input(), bad, out.view()); });
    EXPECT_TRUE(out.guards_intact(0)) << "something ran before the refusal";
  };
  refused({"block_size: 24", "8, 16, 32, 48 or 64"}, [](FusedTiles& t) { t.block_size = 24; });
  refused({"top_k: 0", "at least 1"}, [](FusedTiles& t) { t.top_k = 0; });
  refused({"num_tokens: -1", "at least 0"}, [](FusedTiles& t) { t.num_tokens = -1; });
  refused({"x: 4 rows", "at least 5"}, [](FusedTiles& t) { t.num_tokens = 5; });
  refused({"num_tokens: 4611686018427387904", "at most 1073741823 with top_k = 2"},
          [](FusedTiles& t) { t.num_tokens = std::int64_t{1} << 62; });
  refused({"out: 8 rows", "at least 12"}, [](FusedTiles& t) { t.top_k = 3; });
  refused({"sorted_token_ids: dtype int64", "int32"},
          [](FusedTiles& t) { t.sorted_token_ids.dtype = DType::kInt64; });
  refused({"sorted_token_ids: null data"},
          [](FusedTiles& t) { t.sorted_token_ids.data = nullptr; });
  refused({"sorted_token_ids: on cuda:0"},
          [](FusedTiles& t) { t.sorted_token_ids.device = {DeviceKind::kCuda, 0}; });
  refused({"expert_ids: dtype float32"},
          [](FusedTiles& t) { t.expert_ids.dtype = DType::kFloat32; });
  refused({"num_tokens_past_padded: 0 elements", "at least 1"},
          [](FusedTiles& t) { t.num_tokens_past_padded.size = 0; });
  const std::vector<float> weights(7);
  refused({"topk_weights: 7 elements", "at least 8"}, [&](FusedTiles& t) {
    t.topk_weights = {.data = weights.data(), .dtype = DType::kFloat32, .size = 7};
  });
  refused({"topk_weights: dtype float16", "float32"}, [&](FusedTiles& t) {
    t.topk_weights = {.data = weights.data(), .dtype = DType::kFloat16, .size = 8};
  });
  for (const std::int32_t count : {-16, 8, 32, std::numeric_limits<std::int32_t>::max()}) {
    tiles.count[0] = count;
    refused({"num_tokens_past_padded: " + std::to_string(count), "multiple of block_size = 16"},
            [](FusedTiles&) {});
  }
  tiles.count[0] = 16;
  refused({"num_tokens_past_padded: 16"}, [](FusedTiles& t) { t.expert_ids.size = 0; });
  for (const std::int32_t expert : {-2, 3, std::numeric_limits<std::int32_t>::max()}) {
    tiles.lists.expert_ids[0] = expert;
    refused({"expert_ids: element [0] is " + std::to_string(expert), "expected -1 to 2"},
            [](FusedTiles&) {});
  }
  tiles.lists.expert_ids[0] = 1;
  tiles.lists.sorted_token_ids[3] = -1;
  refused({"sorted_token_ids: element [3] is -1", "at least 0"}, [](FusedTiles&) {});
}

// A refusal of the second tile comes before the first has been written.
TEST_F(StackRefusalTest, TilesAreAllCheckedFirst) {
  const auto stack = CpuBackend::load_gptq_stacked(context, experts.tensors(), experts.spec());
  const Matrix x = test::random_matrix(4, 100, DType::kFloat32, 1);
  Matrix out(4, 80, DType::kFloat32);
  std::vector<std::int32_t> sorted(16, 4);
  sorted[0] = 0;
  const std::vector<std::int32_t> expert_ids = {-1, 99};
  const std::vector<std::int32_t> count = {16};
  expect_refused({"expert_ids: element [1] is 99"}, [&] {
    stack->gemm_phase_fused(context, x.input(),
                            {.sorted_token_ids = array(sorted),
                             .expert_ids = array(expert_ids),
                             .num_tokens_past_padded = array(count),
                             .block_size = 8,
                             .top_k = 1,
                             .num_tokens = 4,
                             .topk_weights = std::nullopt},
                            out.view());
  });
  EXPECT_TRUE(out.guards_intact(0));
}

}  // namespace
}  // namespace marlinq
