// route and moe_align_block_size against references that are written from their description.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "marlinq/routing.hpp"
#include "support/compare.hpp"

namespace marlinq {
namespace {

using test::expect_refused;
using test::Matrix;
using test::Random;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Routed {
  std::vector<std::int32_t> ids;
  std::vector<double> weights;
};

// One row: scores, groups, then the best again and again.
Routed reference_route(const std::vector<double>& logits, const RouteOptions& o) {
  const std::size_t experts = logits.size();
  std::vector<double> score(experts, 0.0);
  double largest = -kInfinity;
  for (const double v : logits) {
    if (v > largest) largest = v;
  }
  double total = 0;
  for (std::size_t e = 0; e < experts; ++e) {
    if (std::isnan(logits[e])) continue;  // NaN scores 0
    if (o.scoring == Scoring::kSigmoid) {
      score[e] = 1 / (1 + std::exp(-logits[e]));
    } else {
      score[e] = logits[e] == largest ? 1 : std::exp(logits[e] - largest);
      total += score[e];
    }
  }
  if (o.scoring == Scoring::kSoftmax && total > 0) {
    for (double& s : score) s /= total;
  }
  std::vector<double> choice = score;
  for (std::size_t e = 0; e < o.correction_bias.size(); ++e) {
    choice[e] += static_cast<double>(o.correction_bias[e]);
  }
  const std::size_t per_group = experts / static_cast<std::size_t>(o.num_groups);
  std::vector<bool> group_allowed(static_cast<std::size_t>(o.num_groups), false);
  for (int round = 0; round < o.top_groups; ++round) {
    int best_group = -1;
    double best = 0;
    for (int g = 0; g < o.num_groups; ++g) {
      if (group_allowed[static_cast<std::size_t>(g)]) continue;
      double first = -kInfinity;
      double second = -kInfinity;
      for (std::size_t i = 0; i < per_group; ++i) {
        const double v = choice[static_cast<std::size_t>(g) * per_group + i];
        if (v > first) {
          second = first;
          first = v;
        } else if (v > second) {
          second = v;
        }
      }
      const bool two = !o.correction_bias.empty() && per_group > 1;
      const double value = two ? first + second : first;
      if (best_group < 0 || value > best) {
        best_group = g;
        best = value;
      }
    }
    group_allowed[static_cast<std::size_t>(best_group)] = true;
  }
  std::vector<bool> taken(experts, false);
  Routed routed;
  double sum = 0;
  for (int slot = 0; slot < o.top_k; ++slot) {
    int best = -1;
    for (std::size_t e = 0; e < experts; ++e) {
      if (taken[e] || !group_allowed[e / per_group]) continue;
      if (best < 0 || choice[e] > choice[static_cast<std::size_t>(best)])
        best = static_cast<int>(e);
    }
    taken[static_cast<std::size_t>(best)] = true;
    routed.ids.push_back(best);
    routed.weights.push_back(score[static_cast<std::size_t>(best)]);
    sum += routed.weights.back();
  }
  for (double& w : routed.weights) {
    if (o.renormalise == Renormalise::kYes && sum > 0) w /= sum;
    w *= static_cast<double>(o.scale);
  }
  return routed;
}

void check_route(const Matrix& logits, const RouteOptions& options) {
  Matrix ids(logits.rows(), options.top_k, DType::kInt32, 3);
  Matrix weights(logits.rows(), options.top_k, DType::kFloat32, 2);
  route(logits.input(), options, ids.view(), weights.view());
  EXPECT_TRUE(ids.guards_intact());
  EXPECT_TRUE(weights.guards_intact());
  for (std::int64_t row = 0; row < logits.rows(); ++row) {
    std::vector<double> values;
    for (std::int64_t e = 0; e < logits.cols(); ++e) values.push_back(logits.at(row, e));
    const Routed expected = reference_route(values, options);
    for (int slot = 0; slot < options.top_k; ++slot) {
      const auto s = static_cast<std::size_t>(slot);
      ASSERT_EQ(ids.at(row, slot), expected.ids[s]) << "row " << row << ", slot " << slot;
      ASSERT_NEAR(weights.at(row, slot), expected.weights[s],
                  test::tolerances::kRoutingWeights * std::fabs(expected.weights[s]))
          << "row " << row << ", slot " << slot;
    }
  }
}

TEST(RouteTest, EveryCombination) {
  std::uint64_t seed = 0;
  for (const std::int64_t experts : {1, 8, 60, 128, 256, 1024}) {
    for (const int top_k : {1, 2, 6, 8, 16}) {
      if (top_k > experts) continue;
      for (const Scoring scoring : {Scoring::kSoftmax, Scoring::kSigmoid}) {
        for (const Renormalise renormalise : {Renormalise::kNo, Renormalise::kYes}) {
          for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
            SCOPED_TRACE(::testing::Message()
                         << experts << " experts, top " << top_k << ", seed " << seed);
            check_route(test::random_matrix(5, experts, dtype, ++seed, 1),
                        {.top_k = top_k,
                         .scoring = scoring,
                         .renormalise = renormalise,
                         .scale = seed % 2 == 0 ? 1.0F : 2.5F});
          }
        }
      }
    }
  }
}

TEST(RouteTest, GroupsAndCorrectionBias) {
  Random random(2);
  for (const std::int64_t experts : {8, 64, 256}) {
    for (const int groups : {1, 4, 8}) {
      for (int top_groups = 1; top_groups <= groups; top_groups += 2) {
        for (const bool biased : {false, true}) {
          const auto room = static_cast<int>(top_groups * experts / groups);
          std::vector<float> bias;
          for (std::int64_t e = 0; biased && e < experts; ++e) {
            bias.push_back(static_cast<float>(random.normal()));
          }
          for (const Scoring scoring : {Scoring::kSoftmax, Scoring::kSigmoid}) {
            SCOPED_TRACE(::testing::Message() << experts << " experts in " << groups << " groups, "
                                              << top_groups << " chosen, bias " << biased);
            check_route(test::random_matrix(9, experts, DType::kFloat32, random.next()),
                        {.top_k = std::min(room, 4),
                         .scoring = scoring,
                         .correction_bias = bias,
                         .num_groups = groups,
                         .top_groups = top_groups});
          }
        }
      }
    }
  }
}

// The bias moves the choice and leaves the weights alone.
TEST(RouteTest, CorrectionBiasDoesNotWeigh) {
  Matrix logits(1, 3, DType::kFloat32);
  logits.fill(0.0);
  Matrix ids(1, 1, DType::kInt32);
  Matrix weights(1, 1, DType::kFloat32);
  const std::vector<float> bias = {0.0F, 0.0F, 5.0F};
  route(logits.input(),
        {.top_k = 1,
         .scoring = Scoring::kSigmoid,
         .renormalise = Renormalise::kNo,
         .correction_bias = bias},
        ids.view(), weights.view());
  EXPECT_EQ(ids.at(0, 0), 2);
  EXPECT_EQ(weights.at(0, 0), 0.5);
}

TEST(RouteTest, TiesGoToTheLowerIndex) {
  for (const Scoring scoring : {Scoring::kSoftmax, Scoring::kSigmoid}) {
    Matrix logits(2, 6, DType::kFloat32);
    const std::vector<double> values = {1, 3, 3, 1, 3, 0};
    for (std::int64_t e = 0; e < 6; ++e) {
      logits.set(0, e, values[static_cast<std::size_t>(e)]);
      logits.set(1, e, 0);
    }
    Matrix ids(2, 5, DType::kInt32);
    Matrix weights(2, 5, DType::kFloat32);
    route(logits.input(), {.top_k = 5, .scoring = scoring}, ids.view(), weights.view());
    EXPECT_EQ(ids.values(), (std::vector<double>{1, 2, 4, 0, 3, 0, 1, 2, 3, 4}));
    check_route(logits, {.top_k = 5, .scoring = scoring});
  }
}

TEST(RouteTest, TiedGroupsGoToTheLowerIndex) {
  Matrix logits(1, 8, DType::kFloat32);
  logits.fill(1.0);
  Matrix ids(1, 4, DType::kInt32);
  Matrix weights(1, 4, DType::kFloat32);
  route(logits.input(), {.top_k = 4, .num_groups = 4, .top_groups = 2}, ids.view(), weights.view());
  EXPECT_EQ(ids.values(), (std::vector<double>{0, 1, 2, 3}));
}

// Whatever the logits are, ids are distinct and in range, and a NaN never beats a number.
TEST(RouteTest, SurvivesNaNAndInfinity) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const std::vector<std::vector<double>> rows = {{nan, 1, nan, -1},
                                                 {nan, nan, nan, nan},
                                                 {kInfinity, 0, kInfinity, nan},
                                                 {-kInfinity, -kInfinity, 0, nan},
                                                 {-kInfinity, -kInfinity, -kInfinity, -kInfinity},
                                                 {1e38, -1e38, 1e38, 0}};
  for (const Scoring scoring : {Scoring::kSoftmax, Scoring::kSigmoid}) {
    Matrix logits(static_cast<std::int64_t>(rows.size()), 4, DType::kFloat32);
    for (std::size_t r = 0; r < rows.size(); ++r) {
      for (std::size_t e = 0; e < 4; ++e) {
        logits.set(static_cast<std::int64_t>(r), static_cast<std::int64_t>(e), rows[r][e]);
      }
    }
    Matrix ids(logits.rows(), 2, DType::kInt32);
    Matrix weights(logits.rows(), 2, DType::kFloat32);
    route(logits.input(), {.top_k = 2, .scoring = scoring}, ids.view(), weights.view());
    for (std::int64_t row = 0; row < logits.rows(); ++row) {
      EXPECT_NE(ids.at(row, 0), ids.at(row, 1));
      for (int slot = 0; slot < 2; ++slot) {
        EXPECT_TRUE(ids.at(row, slot) >= 0 && ids.at(row, slot) < 4);
        EXPECT_TRUE(std::isfinite(weights.at(row, slot))) << "row " << row;
      }
    }
    EXPECT_EQ(ids.at(0, 0), 1);
    EXPECT_EQ(ids.at(2, 0), 0);
    EXPECT_EQ(ids.at(2, 1), scoring == Scoring::kSoftmax ? 2 : 2);
    check_route(logits, {.top_k = 2, .scoring = scoring});
  }
}

TEST(RouteTest, NoRows) {
  Matrix logits(0, 4, DType::kFloat32);
  Matrix ids(0, 2, DType::kInt32);
  Matrix weights(0, 2, DType::kFloat32);
  EXPECT_NO_THROW(route(logits.input(), {.top_k = 2}, ids.view(), weights.view()));
}

TEST(RouteTest, Refusals) {
  const Matrix logits = test::random_matrix(3, 8, DType::kFloat32, 1);
  Matrix ids(3, 2, DType::kInt32);
  Matrix weights(3, 2, DType::kFloat32);
  const auto refused = [&](std::initializer_list<std::string_view> parts, RouteOptions options,
                           ConstMatrixView in, MatrixView id, MatrixView weight) {
    expect_refused(parts, [&] { route(in, options, id, weight); });
  };
  const auto bad_options = [&](std::initializer_list<std::string_view> parts,
                               RouteOptions options) {
    refused(parts, options, logits.input(), ids.view(), weights.view());
  };
  bad_options({"top_k: 0", "expected 1 to 8"}, {.top_k = 0});
  bad_options({"top_k: -1"}, {.top_k = -1});
  bad_options({"top_k: 9", "expected 1 to 8", "8 experts"}, {.top_k = 9});
  bad_options({"num_groups: 3", "divisor of 8"}, {.top_k = 2, .num_groups = 3});
  bad_options({"num_groups: 0"}, {.top_k = 2, .num_groups = 0});
  bad_options({"top_groups: 3", "expected 1 to 2"}, {.top_k = 2, .num_groups = 2, .top_groups = 3});
  bad_options({"top_groups: 0"}, {.top_k = 2, .num_groups = 2, .top_groups = 0});
  bad_options({"top_groups: 1", "top_k = 2"}, {.top_k = 2, .num_groups = 8, .top_groups = 1});
  const std::vector<float> bias(7);
  bad_options({"correction_bias: 7 elements", "expected 8"}, {.top_k = 2, .correction_bias = bias});

  const RouteOptions two = {.top_k = 2};
  ConstMatrixView in = logits.input();
  in.dtype = DType::kInt32;
  refused({"logits: dtype int32", "float32, float16 or bfloat16"}, two, in, ids.view(),
          weights.view());
  in = logits.input();
  in.data = nullptr;
  refused({"logits: null data"}, two, in, ids.view(), weights.view());
  in = logits.input();
  in.row_stride = 7;
  refused({"logits: row stride 7", "at least 8"}, two, in, ids.view(), weights.view());
  in = logits.input();
  in.device = {DeviceKind::kCuda, 0};
  refused({"logits: on cuda:0", "expected cpu"}, two, in, ids.view(), weights.view());
  in = logits.input();
  in.cols = 1025;
  in.row_stride = 1025;
  refused({"logits: 1025 experts", "expected 1 to 1024"}, two, in, ids.view(), weights.view());
  in.cols = 0;
  refused({"logits: 0 experts"}, two, in, ids.view(), weights.view());
  in = logits.input();
  in.rows = -1;
  refused({"logits: -1 rows"}, two, in, ids.view(), weights.view());

  MatrixView id = ids.view();
  id.dtype = DType::kInt64;
  refused({"ids: dtype int64", "expected int32"}, two, logits.input(), id, weights.view());
  id = ids.view();
  id.rows = 2;
  refused({"ids: 2 rows", "expected at least 3"}, two, logits.input(), id, weights.view());
  id = ids.view();
  id.cols = 3;
  refused({"ids: 3 columns", "expected 2"}, two, logits.input(), id, weights.view());
  MatrixView weight = weights.view();
  weight.dtype = DType::kFloat16;
  refused({"weights: dtype float16", "expected float32"}, two, logits.input(), ids.view(), weight);
  weight = weights.view();
  weight.cols = 1;
  refused({"weights: 1 columns", "expected 2"}, two, logits.input(), ids.view(), weight);
}

// --- moe_align_block_size ---

TokenTiles reference_align(const Matrix& ids, int block_size, int num_experts,
                           const std::vector<std::int32_t>& map) {
  const auto count = static_cast<std::int32_t>(ids.rows() * ids.cols());
  TokenTiles tiles;
  for (int e = 0; e <= num_experts; ++e) {
    const int wanted = e == num_experts ? -1 : e;
    std::vector<std::int32_t> mine;
    for (std::int32_t i = 0; i < count; ++i) {
      if (ids.at(i / ids.cols(), i % ids.cols()) == wanted) mine.push_back(i);
    }
    while (mine.size() % static_cast<std::size_t>(block_size) != 0) mine.push_back(count);
    for (std::size_t i = 0; i < mine.size(); i += static_cast<std::size_t>(block_size)) {
      tiles.expert_ids.push_back(wanted < 0 || map.empty() ? wanted
                                                           : map[static_cast<std::size_t>(e)]);
    }
    tiles.sorted_token_ids.insert(tiles.sorted_token_ids.end(), mine.begin(), mine.end());
  }
  tiles.num_tokens_past_padded = static_cast<std::int32_t>(tiles.sorted_token_ids.size());
  return tiles;
}

void check_align(const Matrix& ids, int block_size, int num_experts,
                 const std::vector<std::int32_t>& map = {}) {
  const TokenTiles expected = reference_align(ids, block_size, num_experts, map);
  const TokenTiles actual = moe_align_block_size(ids.input(), block_size, num_experts, map);
  EXPECT_EQ(actual.sorted_token_ids, expected.sorted_token_ids);
  EXPECT_EQ(actual.expert_ids, expected.expert_ids);
  EXPECT_EQ(actual.num_tokens_past_padded, expected.num_tokens_past_padded);
}

Matrix random_ids(std::int64_t rows, std::int64_t cols, DType dtype, int num_experts,
                  int percent_absent, Random& random) {
  Matrix ids(rows, cols, dtype, 1);
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < cols; ++j) {
      ids.set(
          i, j,
          random.chance(percent_absent) ? -1.0 : static_cast<double>(random.below(num_experts)));
    }
  }
  return ids;
}

TEST(AlignTest, EveryBlockSizeAndNumberOfExperts) {
  Random random(8);
  for (const int block_size : {8, 16, 32, 48, 64}) {
    for (const int experts : {1, 2, 8, 60, 128, 256, 1024}) {
      for (const DType dtype : {DType::kInt32, DType::kInt64}) {
        for (const std::int64_t rows : {1, 2, 33, 130}) {
          SCOPED_TRACE(::testing::Message() << "block " << block_size << ", " << experts
                                            << " experts, " << rows << " rows");
          check_align(random_ids(rows, 1 + random.below(8), dtype, experts, 20, random), block_size,
                      experts);
        }
      }
    }
  }
}

TEST(AlignTest, AllOnOneExpertAndAllAbsent) {
  for (const double id : {0.0, 7.0, -1.0}) {
    Matrix ids(65, 2, DType::kInt32);
    ids.fill(id);
    check_align(ids, 64, 8);
  }
}

TEST(AlignTest, ExpertMap) {
  Random random(9);
  const std::vector<std::int32_t> map = {-1, 0, -1, 1, 2, -1, 3, -1};
  check_align(random_ids(40, 2, DType::kInt64, 8, 10, random), 16, 8, map);
}

TEST(AlignTest, Empty) {
  const TokenTiles tiles = moe_align_block_size(Matrix(0, 4, DType::kInt32).input(), 16, 8);
  EXPECT_TRUE(tiles.sorted_token_ids.empty());
  EXPECT_TRUE(tiles.expert_ids.empty());
  EXPECT_EQ(tiles.num_tokens_past_padded, 0);
}

// Enough for the routing that pads most: an id each for as many experts as there are, and for -1.
TEST(AlignTest, MostAlignedIds) {
  for (const int block_size : {8, 48, 64}) {
    for (const int experts : {1, 2, 60, 1024}) {
      for (const std::int64_t count : {0, 1, 2, 3, 61, 500, 1025, 1026, 3000}) {
        Matrix ids(count, 1, DType::kInt32);
        for (std::int64_t i = 0; i < count; ++i) {
          const std::int64_t bucket = std::min<std::int64_t>(i, experts);
          ids.set(i, 0, bucket == experts ? -1.0 : static_cast<double>(bucket));
        }
        const TokenTiles tiles = moe_align_block_size(ids.input(), block_size, experts);
        const std::int64_t most = most_aligned_ids(count, block_size, experts);
        EXPECT_LE(tiles.num_tokens_past_padded, most);
        EXPECT_EQ(most % block_size, 0);
        // No more than that, where the last bucket is full of all that is left.
        if (count <= experts + 1) {
          EXPECT_EQ(tiles.num_tokens_past_padded, most);
        }
      }
    }
  }
}

TEST(AlignTest, StableByHand) {
  Matrix ids(3, 2, DType::kInt32);
  const std::vector<double> values = {1, 0, 1, -1, 0, 1};
  for (int i = 0; i < 6; ++i) ids.set(i / 2, i % 2, values[static_cast<std::size_t>(i)]);
  const TokenTiles tiles = moe_align_block_size(ids.input(), 8, 2);
  EXPECT_EQ(tiles.sorted_token_ids, (std::vector<std::int32_t>{1, 4, 6, 6, 6, 6, 6, 6,  //
                                                               0, 2, 5, 6, 6, 6, 6, 6,  //
                                                               3, 6, 6, 6, 6, 6, 6, 6}));
  EXPECT_EQ(tiles.expert_ids, (std::vector<std::int32_t>{0, 1, -1}));
  EXPECT_EQ(tiles.num_tokens_past_padded, 24);
}

TEST(AlignTest, Refusals) {
  Matrix ids(2, 2, DType::kInt32);
  ids.fill(0);
  for (const int block : {-8, 0, 1, 7, 24, 128}) {
    expect_refused({"block_size: " + std::to_string(block), "8, 16, 32, 48 or 64"},
                   [&] { moe_align_block_size(ids.input(), block, 4); });
  }
  for (const int experts : {-1, 0, 1025}) {
    expect_refused({"num_experts: " + std::to_string(experts), "expected 1 to 1024"},
                   [&] { moe_align_block_size(ids.input(), 16, experts); });
  }
  const std::vector<std::int32_t> map(3);
  expect_refused({"expert_map: 3 elements", "expected 4"},
                 [&] { moe_align_block_size(ids.input(), 16, 4, map); });
  for (const double id : {4.0, -2.0, 2147483647.0, -2147483648.0}) {
    ids.set(1, 0, id);
    expect_refused({"topk_ids: element [1, 0] is", "expected -1 to 3"},
                   [&] { moe_align_block_size(ids.input(), 16, 4); });
  }
  Matrix wide(1, 1, DType::kInt64);
  wide.set(0, 0, 4294967296.0);  // would be 0 in 32 bits
  expect_refused({"topk_ids: element [0, 0] is 4294967296"},
                 [&] { moe_align_block_size(wide.input(), 16, 4); });
  const Matrix floats(2, 2, DType::kFloat32);
  expect_refused({"topk_ids: dtype float32", "int32 or int64"},
                 [&] { moe_align_block_size(floats.input(), 16, 4); });
  ConstMatrixView null = ids.input();
  null.data = nullptr;
  expect_refused({"topk_ids: null data"}, [&] { moe_align_block_size(null, 16, 4); });
}

}  // namespace
}  // namespace marlinq
