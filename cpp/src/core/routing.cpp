// The checks of routing, and routing on the host. The grouped choice follows DeepSeek-V2 (best
// expert of a group) and DeepSeek-V3 (sum of the best two, with the correction bias), as their
// published model code does.
#include "core/routing.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/host_ids.hpp"
#include "core/matrix_checks.hpp"

namespace marlinq {
namespace {

constexpr double kNever = -std::numeric_limits<double>::infinity();

// Logits to scores. A NaN scores 0.
void score(std::vector<double>& values, Scoring scoring) {
  if (scoring == Scoring::kSigmoid) {
    for (double& value : values) value = std::isnan(value) ? 0.0 : 1.0 / (1.0 + std::exp(-value));
    return;
  }
  double largest = kNever;
  for (const double value : values) {
    if (!std::isnan(value)) largest = std::max(largest, value);
  }
  double sum = 0;
  for (double& value : values) {
    // Equal infinities would give NaN: the largest logits share the weight whatever they are.
    value = std::isnan(value) ? 0.0 : (value == largest ? 1.0 : std::exp(value - largest));
    sum += value;
  }
  for (double& value : values) value = sum > 0 ? value / sum : 0.0;
}

// Takes all experts outside the best groups out of the choice.
void keep_top_groups(std::vector<double>& choice, const RouteOptions& options) {
  const auto per_group = static_cast<std::ptrdiff_t>(choice.size()) / options.num_groups;
  std::vector<double> group_scores;
  for (int group = 0; group < options.num_groups; ++group) {
    std::vector<double> members(choice.begin() + group * per_group,
                                choice.begin() + (group + 1) * per_group);
    const std::ptrdiff_t best =
        options.correction_bias.empty() ? 1 : std::min<std::ptrdiff_t>(2, per_group);
    std::partial_sort(members.begin(), members.begin() + best, members.end(), std::greater<>());
    group_scores.push_back(std::accumulate(members.begin(), members.begin() + best, 0.0));
  }
  std::vector<int> groups(static_cast<std::size_t>(options.num_groups));
  std::iota(groups.begin(), groups.end(), 0);
  std::stable_sort(groups.begin(), groups.end(), [&](int a, int b) {
    return group_scores[static_cast<std::size_t>(a)] > group_scores[static_cast<std::size_t>(b)];
  });
  for (std::size_t rank = static_cast<std::size_t>(options.top_groups); rank < groups.size();
       ++rank) {
    const std::ptrdiff_t first = groups[rank] * per_group;
    std::fill(choice.begin() + first, choice.begin() + first + per_group, kNever);
  }
}

// The part that is the same for lists in host memory and elsewhere.
void check_align(const ConstMatrixView& topk_ids, int block_size, int num_experts,
                 std::int64_t map_size, Device device) {
  if (topk_ids.dtype != DType::kInt32 && topk_ids.dtype != DType::kInt64) {
    refuse_argument(
        concat("topk_ids: dtype ", to_string(topk_ids.dtype), ", expected int32 or int64"));
  }
  check_matrix(topk_ids, "topk_ids", device, 0, topk_ids.cols);
  check_tile_size(block_size);
  check_num_experts(num_experts);
  if (map_size != 0 && map_size != num_experts) {
    refuse_argument(concat("expert_map: ", map_size, " elements, expected ", num_experts));
  }
  const std::int64_t ids = topk_ids.rows * topk_ids.cols;
  if (ids > std::numeric_limits<std::int32_t>::max() / 2) {
    refuse_argument(concat("topk_ids: ", ids, " elements, expected at most ",
                           std::numeric_limits<std::int32_t>::max() / 2));
  }
}

}  // namespace

void check_route(const ConstMatrixView& logits, const RouteOptions& options, const MatrixView& ids,
                 const MatrixView& weights, Device device) {
  const std::int64_t experts = logits.cols;
  check_input(logits, "logits", device, 0, experts);
  if (experts < 1 || experts > kMaxExperts) {
    refuse_argument(concat("logits: ", experts, " experts, expected 1 to ", kMaxExperts));
  }
  if (options.top_k < 1 || options.top_k > std::min<std::int64_t>(kMaxTopK, experts)) {
    refuse_argument(concat("top_k: ", options.top_k, ", expected 1 to ",
                           std::min<std::int64_t>(kMaxTopK, experts), " for ", experts,
                           " experts"));
  }
  if (options.num_groups < 1 || experts % options.num_groups != 0) {
    refuse_argument(concat("num_groups: ", options.num_groups, ", expected a divisor of ", experts,
                           " experts"));
  }
  if (options.top_groups < 1 || options.top_groups > options.num_groups ||
      options.top_groups * (experts / options.num_groups) < options.top_k) {
    refuse_argument(concat("top_groups: ", options.top_groups, ", expected 1 to ",
                           options.num_groups, " and at least top_k = ", options.top_k,
                           " experts in them"));
  }
  if (!options.correction_bias.empty() &&
      static_cast<std::int64_t>(options.correction_bias.size()) != experts) {
    refuse_argument(concat("correction_bias: ", options.correction_bias.size(),
                           " elements, expected ", experts));
  }
  for (std::size_t e = 0; e < options.correction_bias.size(); ++e) {
    if (!std::isfinite(options.correction_bias[e])) {
      refuse_argument(concat("correction_bias: element [", e, "] is ", options.correction_bias[e],
                             ", expected a finite number"));
    }
  }
  check_matrix(ids, "ids", device, logits.rows, options.top_k);
  check_matrix(weights, "weights", device, logits.rows, options.top_k);
  if (ids.dtype != DType::kInt32) {
    refuse_argument(concat("ids: dtype ", to_string(ids.dtype), ", expected int32"));
  }
  if (weights.dtype != DType::kFloat32) {
    refuse_argument(concat("weights: dtype ", to_string(weights.dtype), ", expected float32"));
  }
}

void check_align(const ConstMatrixView& topk_ids, int block_size, int num_experts,
                 const ConstArrayView& expert_map, const ArrayView& sorted_token_ids,
                 const ArrayView& expert_ids, const ArrayView& num_tokens_past_padded,
                 Device device) {
  check_align(topk_ids, block_size, num_experts, expert_map.size, device);
  if (expert_map.size != 0) {
    const Device host{};
    check_array(expert_map, "expert_map", expert_map.device == host ? host : device, DType::kInt32,
                num_experts);
  }
  const std::int64_t most =
      most_aligned_ids(topk_ids.rows * topk_ids.cols, block_size, num_experts);
  check_array(as_const(sorted_token_ids), "sorted_token_ids", device, DType::kInt32, most);
  check_array(as_const(expert_ids), "expert_ids", device, DType::kInt32, most / block_size);
  check_array(as_const(num_tokens_past_padded), "num_tokens_past_padded", device, DType::kInt32, 1);
}

void route(const ConstMatrixView& logits, const RouteOptions& options, const MatrixView& ids,
           const MatrixView& weights) {
  check_route(logits, options, ids, weights, Device{});
  const auto experts = static_cast<std::size_t>(logits.cols);
  std::vector<double> scores(experts);
  std::vector<double> choice(experts);
  std::vector<std::int32_t> order(experts);
  for (std::int64_t row = 0; row < logits.rows; ++row) {
    for (std::size_t e = 0; e < experts; ++e) {
      scores[e] = read_float(logits.data, logits.dtype,
                             row * logits.row_stride + static_cast<std::int64_t>(e));
    }
    choice = scores;
    score(scores, options.scoring);
    for (std::size_t e = 0; e < experts; ++e)
      choice[e] = std::isnan(choice[e]) ? kNever : scores[e];
    for (std::size_t e = 0; e < options.correction_bias.size(); ++e) {
      choice[e] += static_cast<double>(options.correction_bias[e]);
    }
    if (options.top_groups < options.num_groups) keep_top_groups(choice, options);
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + options.top_k, order.end(),
                      [&](std::int32_t a, std::int32_t b) {
                        const double x = choice[static_cast<std::size_t>(a)];
                        const double y = choice[static_cast<std::size_t>(b)];
                        return x != y ? x > y : a < b;
                      });
    double sum = 0;
    for (int slot = 0; slot < options.top_k; ++slot)
      sum += scores[static_cast<std::size_t>(order[static_cast<std::size_t>(slot)])];
    const double factor = static_cast<double>(options.scale) /
                          (options.renormalise == Renormalise::kYes && sum > 0 ? sum : 1.0);
    auto* id = static_cast<std::int32_t*>(ids.data) + row * ids.row_stride;
    auto* weight = static_cast<float*>(weights.data) + row * weights.row_stride;
    for (int slot = 0; slot < options.top_k; ++slot) {
      id[slot] = order[static_cast<std::size_t>(slot)];
      weight[slot] = static_cast<float>(scores[static_cast<std::size_t>(id[slot])] * factor);
    }
  }
}

TokenTiles moe_align_block_size(const ConstMatrixView& topk_ids, int block_size, int num_experts,
                                std::span<const std::int32_t> expert_map) {
  TokenTiles tiles;
  align_tokens(topk_ids, block_size, num_experts, expert_map, tiles);
  return tiles;
}

void align_tokens(const ConstMatrixView& topk_ids, int block_size, int num_experts,
                  std::span<const std::int32_t> expert_map, TokenTiles& tiles) {
  check_align(topk_ids, block_size, num_experts, static_cast<std::int64_t>(expert_map.size()),
              Device{});
  const std::int64_t ids = topk_ids.rows * topk_ids.cols;
  // Bucket e < num_experts is expert e; the last bucket is -1.
  const auto bucket_of = [&](std::int64_t index) {
    const std::int64_t row = index / topk_ids.cols;
    const std::int64_t column = index % topk_ids.cols;
    const std::int64_t id = checked_topk_id(topk_ids, row, column, num_experts);
    return static_cast<std::size_t>(id < 0 ? num_experts : id);
  };
  std::array<std::int64_t, kMaxExperts + 1> next = {};
  const std::size_t buckets = static_cast<std::size_t>(num_experts) + 1;
  for (std::int64_t i = 0; i < ids; ++i) ++next[bucket_of(i)];
  tiles.expert_ids.clear();
  std::int64_t first = 0;
  for (std::size_t bucket = 0; bucket < buckets; ++bucket) {
    const std::int64_t count = ceil_div(next[bucket], block_size);
    std::int32_t name =
        bucket == static_cast<std::size_t>(num_experts) ? -1 : static_cast<std::int32_t>(bucket);
    if (name >= 0 && !expert_map.empty()) name = expert_map[bucket];
    tiles.expert_ids.insert(tiles.expert_ids.end(), static_cast<std::size_t>(count), name);
    next[bucket] = first;
    first += count * block_size;
  }
  tiles.num_tokens_past_padded = static_cast<std::int32_t>(first);
  tiles.sorted_token_ids.assign(static_cast<std::size_t>(first), static_cast<std::int32_t>(ids));
  for (std::int64_t i = 0; i < ids; ++i) {
    tiles.sorted_token_ids[static_cast<std::size_t>(next[bucket_of(i)]++)] =
        static_cast<std::int32_t>(i);
  }
}

}  // namespace marlinq
