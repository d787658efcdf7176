// Random damage to layers: what comes of it either loads and gives what the reference gives for the
// same tensors, or is refused as invalid_argument. Nothing else, and nothing crashes. The damage
// never lies about memory: a tensor claims at most the bytes that it has.
#include <gtest/gtest.h>

#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "marlinq/handle.hpp"
#include "marlinq/registry.hpp"
#include "support/compare.hpp"
#include "support/moe_reference.hpp"

namespace marlinq {
namespace {

using test::Layer;
using test::LayerOptions;
using test::Matrix;
using test::Order;
using test::Random;
using test::Zeros;

constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t kLeast = std::numeric_limits<std::int64_t>::min();

LayerOptions random_options(Random& random) {
  LayerOptions o;
  o.bits = random.pick<int>({2, 3, 4, 8});
  o.k = random.pick<std::int64_t>({1, 7, 32, 33, 60, 64, 96, 130});
  o.n = random.pick<std::int64_t>({1, 7, 16, 31, 32, 33, 48});
  o.group_size = random.pick<std::int64_t>({-1, 7, 16, 24, 32, 64, 128, 1024});
  o.zeros = static_cast<Zeros>(random.below(5));
  o.order = static_cast<Order>(random.below(5));
  o.scales = static_cast<DType>(random.below(3));
  if (random.chance(40)) o.bias = static_cast<DType>(random.below(3));
  o.seed = random.next();
  return o;
}

std::int64_t odd_extent(Random& random, std::int64_t right) {
  if (random.chance(40)) {
    return random.pick<std::int64_t>({0, -1, 1, kMost, kLeast, kMost / 4, std::int64_t{1} << 32});
  }
  const std::int64_t base = right > kLeast / 4 && right < kMost / 4 ? right : 64;
  return random.pick<std::int64_t>({base - 1, base + 1, base * 2, base / 2});
}

// A layer and what is claimed of it.
struct Subject {
  Layer layer;
  GptqModule module;
  GptqSpec spec;
  std::string history;
};

void damage(Subject& s, Random& random) {
  const std::vector<std::pair<const char*, HostTensor*>> tensors = {{"qweight", &s.module.qweight},
                                                                    {"scales", &s.module.scales},
                                                                    {"qzeros", &s.module.qzeros},
                                                                    {"g_idx", &s.module.g_idx},
                                                                    {"bias", &s.module.bias}};
  const auto& [name, tensor] = random.pick(tensors);
  const auto note = [&](const std::string& what) { s.history += what + "; "; };
  switch (random.below(14)) {
    case 0:
      tensor->dtype = static_cast<DType>(random.below(5));
      note(std::string(name) + " dtype");
      break;
    case 1: {
      const auto axis = static_cast<std::size_t>(random.below(2));
      tensor->shape[axis] = odd_extent(random, tensor->shape[axis]);
      note(std::string(name) + " shape");
      break;
    }
    case 2:
      tensor->rank = random.pick<int>({-1, 0, 1, 2, 3, 100});
      note(std::string(name) + " rank");
      break;
    case 3:  // shorter only: more would be a lie about memory
      tensor->bytes =
          tensor->bytes == 0
              ? 0
              : static_cast<std::size_t>(random.below(static_cast<std::int64_t>(tensor->bytes)));
      note(std::string(name) + " bytes");
      break;
    case 4:
      tensor->data = nullptr;
      note(std::string(name) + " null");
      break;
    case 5:
      *tensor = {};
      note(std::string(name) + " dropped");
      break;
    case 6:
      s.spec.bits =
          random.pick<int>({2, 3, 4, 8, 0, -4, 1, 5, 6, 7, 16, 32, 64,
                            std::numeric_limits<int>::max(), std::numeric_limits<int>::min()});
      note("bits");
      break;
    case 7:
      s.spec.group_size = odd_extent(random, s.spec.group_size);
      note("group_size");
      break;
    case 8:
      s.spec.k = random.chance(40) ? 0 : odd_extent(random, s.spec.k);
      note("k");
      break;
    case 9:
      s.spec.n = random.chance(40) ? s.layer.options.n : odd_extent(random, s.layer.options.n);
      note("n");
      break;
    case 10:
      s.spec.zero_points = static_cast<ZeroPoints>(random.below(3));
      s.spec.labelled = static_cast<ZeroPoints>(random.below(3));
      s.spec.symmetry = static_cast<Symmetry>(random.below(3));
      note("zero points");
      break;
    case 11:
      if (!s.layer.g_idx.empty()) {
        const std::int64_t groups = s.layer.groups;
        s.layer.g_idx[static_cast<std::size_t>(random.below(s.layer.options.k))] =
            static_cast<std::int32_t>(random.pick<std::int64_t>(
                {0, -1, groups - 1, -groups, groups, -groups - 1, 1 << 30, -(1 << 30)}));
        note("g_idx value");
      }
      break;
    case 12:
      if (!s.layer.scales.empty()) {
        const double value =
            random.pick<double>({0.0, -1.0, 1e-30, std::numeric_limits<double>::infinity(),
                                 std::numeric_limits<double>::quiet_NaN()});
        test::write_element(s.layer.scales.data(), s.layer.options.scales,
                            random.below(s.layer.groups * s.layer.options.n), value);
        note("scale value");
      }
      break;
    default:
      for (std::uint32_t& word : s.layer.qzeros) {
        word = random.pick<std::uint32_t>(
            {0U, ~0U, 0x77777777U, 0x88888888U, static_cast<std::uint32_t>(random.next())});
      }
      note("qzeros words");
      break;
  }
}

Subject make_subject(Random& random) {
  Subject s;
  s.layer = test::make_layer(random_options(random));
  s.module = s.layer.module();
  s.spec = s.layer.spec();
  s.history = describe(s.layer.options) + "; ";
  for (std::int64_t i = random.below(4); i > 0; --i) damage(s, random);
  return s;
}

// What a layer that was accepted must compute, by the words of the tensors alone.
test::Dense accepted_dense(const GptqModule& module, const GptqSpec& spec, std::int64_t k) {
  return test::dequantise(module, spec.bits, spec.group_size, k,
                          test::expected_convention(module, spec));
}

// What the words say is judged most closely by the compute type with the least error.
const LoadOptions kExact{.compute = Compute::kFloat32};

class FuzzTest : public ::testing::Test {
 protected:
  FuzzTest()
      : context_(open_context({}, {.threads = 2})),
        witness_(test::make_layer({.k = 64, .n = 32, .group_size = 32})),
        witness_linear_(context_.load_gptq(witness_.tensors(), witness_.spec(), kExact)),
        witness_x_(test::random_matrix(8, 64, DType::kFloat32, 1)),
        witness_y_(test::multiply(witness_x_.values(), 8, witness_.dense())) {}

  // A layer that was loaded before all the damage still does what it did.
  ::testing::AssertionResult witness_works() const {
    Matrix out(8, 32, DType::kFloat32);
    witness_linear_.forward(context_, witness_x_.input(), out.view(), 8);
    return test::matches(out, witness_y_, 8);
  }

  // True when f ran, false when it was refused as it should be.
  template <class F>
  bool accepted(const std::string& history, const F& f) {
    try {
      f();
      return true;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument) << error.what() << "\n" << history;
      EXPECT_FALSE(std::string(error.what()).empty()) << history;
    } catch (const std::exception& error) {
      ADD_FAILURE() << "not an Error: " << error.what() << "\n" << history;
    }
    return false;
  }

  ContextHandle context_;
  Layer witness_;
  LinearHandle witness_linear_;
  Matrix witness_x_;
  test::Product witness_y_;
};

TEST_F(FuzzTest, DamagedLayers) {
  int loaded = 0;
  int refused = 0;
  for (std::uint64_t seed = 1; seed <= 20000; ++seed) {
    Random random(seed);
    Subject s = make_subject(random);
    const std::string history = "seed " + std::to_string(seed) + ": " + s.history;
    std::optional<LinearHandle> linear;
    if (!accepted(history, [&] { linear = context_.load_gptq(s.module, s.spec, kExact); })) {
      ++refused;
      if (seed % 500 == 0) {
        ASSERT_TRUE(witness_works()) << history;
      }
      continue;
    }
    ++loaded;
    const test::Dense dense = accepted_dense(s.module, s.spec, linear->in_features());
    ASSERT_EQ(linear->out_features(), dense.n) << history;
    const std::int64_t m = 1 + random.below(9);
    const auto dtype = static_cast<DType>(random.below(3));
    const Matrix x = test::random_matrix(m, dense.k, dtype, seed, random.below(3));
    // float32, for scales that are read as another dtype may be too small for the others.
    Matrix out(m, dense.n, DType::kFloat32, random.below(3));
    linear->forward(context_, x.input(), out.view(), m);
    ASSERT_TRUE(test::matches(out, test::multiply(x.values(), m, dense), m)) << history;
  }
  // Both ends are reached often enough to mean something.
  EXPECT_GT(loaded, 4000);
  EXPECT_GT(refused, 4000);
}

TEST_F(FuzzTest, DamagedStacks) {
  int loaded = 0;
  int refused = 0;
  for (std::uint64_t seed = 1; seed <= 3000; ++seed) {
    Random random(seed);
    LayerOptions options = random_options(random);
    std::vector<Subject> subjects;
    std::string history = "seed " + std::to_string(seed) + ": ";
    const std::int64_t count = 1 + random.below(4);
    for (std::int64_t e = 0; e < count; ++e) {
      options.seed = random.next();
      if (random.chance(10)) options.zeros = static_cast<Zeros>(random.below(5));
      if (random.chance(30)) options.order = static_cast<Order>(random.below(5));
      if (random.chance(5)) options = random_options(random);
      Subject s;
      s.layer = test::make_layer(options);
      s.module = s.layer.module();
      s.spec = s.layer.spec();
      if (random.chance(15)) damage(s, random);
      history += "expert " + std::to_string(e) + ": " + describe(options) + ", " + s.history;
      subjects.push_back(std::move(s));
    }
    std::vector<GptqTensors> tensors;
    for (const Subject& s : subjects) tensors.emplace_back(s.module);
    const GptqSpec spec = subjects.front().spec;
    std::optional<ExpertStackHandle> stack;
    if (!accepted(history, [&] { stack = context_.load_gptq_stacked(tensors, spec, kExact); })) {
      ++refused;
      continue;
    }
    ++loaded;
    const Matrix x = test::random_matrix(5, stack->k(), DType::kFloat32, seed);
    for (std::int64_t e = 0; e < count; ++e) {
      const test::Dense dense =
          accepted_dense(subjects[static_cast<std::size_t>(e)].module, spec, stack->k());
      Matrix out(5, stack->n_per_expert(), DType::kFloat32);
      const ExpertDispatch all{.expert = static_cast<std::int32_t>(e), .rows = 5};
      stack->gemm_phase_batched(context_, x.input(), {&all, 1}, out.view());
      ASSERT_TRUE(test::matches(out, test::multiply(x.values(), 5, dense), 5)) << history;
    }
  }
  EXPECT_GT(loaded, 500);
  EXPECT_GT(refused, 500);
  EXPECT_TRUE(witness_works());
}

// Random dispatches and tile lists: refused, or inside their matrices.
TEST_F(FuzzTest, DamagedDispatchesAndTiles) {
  const test::Experts experts = test::make_experts(3, 1, {.k = 64, .n = 32, .group_size = 32});
  const ExpertStackHandle stack = context_.load_gptq_stacked(experts.tensors(), experts.spec());
  const Matrix x = test::random_matrix(12, 64, DType::kFloat32, 1);
  int ran = 0;
  int refused = 0;
  for (std::uint64_t seed = 1; seed <= 5000; ++seed) {
    Random random(seed);
    const std::string history = "seed " + std::to_string(seed);
    const auto small = [&](std::int64_t most) {
      return random.chance(4) ? random.pick<std::int64_t>({-1, kMost, kLeast, most + 1, -most})
                              : random.below(most);
    };
    std::vector<ExpertDispatch> dispatches;
    for (std::int64_t i = random.below(4); i > 0; --i) {
      dispatches.push_back({.expert = static_cast<std::int32_t>(small(3)),
                            .input_row = small(10),
                            .output_row = small(10),
                            .rows = small(4)});
    }
    Matrix out(12, 32, DType::kFloat32);
    (accepted(history,
              [&] { stack.gemm_phase_batched(context_, x.input(), dispatches, out.view()); })
         ? ran
         : refused)++;
    ASSERT_TRUE(out.guards_intact()) << history;

    std::vector<std::int32_t> ids;
    for (int i = 0; i < 32; ++i) ids.push_back(static_cast<std::int32_t>(small(30)));
    std::vector<std::int32_t> expert_ids;
    for (int i = 0; i < 4; ++i) expert_ids.push_back(static_cast<std::int32_t>(small(5)) - 1);
    const std::vector<std::int32_t> entries = {random.chance(90)
                                                   ? static_cast<std::int32_t>(8 * random.below(5))
                                                   : static_cast<std::int32_t>(small(40))};
    const auto array = [](const std::vector<std::int32_t>& values) {
      return ConstArrayView{.data = values.data(),
                            .dtype = DType::kInt32,
                            .size = static_cast<std::int64_t>(values.size())};
    };
    Matrix fused(24, 32, DType::kFloat32);
    (accepted(history,
              [&] {
                stack.gemm_phase_fused(context_, x.input(),
                                       {.sorted_token_ids = array(ids),
                                        .expert_ids = array(expert_ids),
                                        .num_tokens_past_padded = array(entries),
                                        .block_size = random.chance(95) ? 8 : 16,
                                        .top_k = 2,
                                        .num_tokens = 12,
                                        .topk_weights = std::nullopt},
                                       fused.view());
              })
         ? ran
         : refused)++;
    ASSERT_TRUE(fused.guards_intact()) << history;
  }
  EXPECT_GT(ran, 1000);
  EXPECT_GT(refused, 1000);
  EXPECT_TRUE(witness_works());
}

}  // namespace
}  // namespace marlinq
