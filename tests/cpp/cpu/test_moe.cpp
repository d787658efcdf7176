// The MoE block on the CPU against a double reference.
#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "support/compare.hpp"
#include "support/cpu_kernels.hpp"
#include "support/moe_reference.hpp"

namespace marlinq {
namespace {

using test::expect_refused;
using test::Experts;
using test::Layer;
using test::make_experts;
using test::Matrix;
using test::MoeReference;
using test::Order;
using test::Random;
using test::Zeros;

using StackPtr = std::shared_ptr<MarlinExpertStack<CpuBackend>>;

constexpr std::int64_t kHidden = 96;
constexpr std::int64_t kInner = 80;

// The parts of a block and the reference of the same weights.
struct Block {
  explicit Block(std::int64_t experts, CpuBackend::Context& context,
                 const LoadOptions& options = {}, bool with_bias = true)
      : gate_up(make_experts(experts, 2,
                             {.k = kHidden,
                              .n = kInner,
                              .group_size = 32,
                              .zeros = Zeros::kAsymmetricV1,
                              .order = Order::kActOrder,
                              .bias = bias(with_bias),
                              .seed = 100})),
        down(make_experts(experts, 1,
                          {.k = kInner,
                           .n = kHidden,
                           .group_size = 32,
                           .order = Order::kActOrder,
                           .scales = DType::kBFloat16,
                           .bias = bias(with_bias),
                           .seed = 500})) {
    parts.gate_up =
        CpuBackend::load_gptq_stacked(context, gate_up.tensors(), gate_up.spec(), options);
    parts.down = CpuBackend::load_gptq_stacked(context, down.tensors(), down.spec(), options);
    reference.gate_up = gate_up.dense();
    reference.down = down.dense();
  }

  void add_shared_expert(CpuBackend::Context& context, const LoadOptions& options = {}) {
    shared_gate_up = make_experts(1, 2, {.k = kHidden, .n = 48, .group_size = 32, .seed = 800});
    shared_down = make_experts(1, 1, {.k = 48, .n = kHidden, .group_size = 16, .seed = 900});
    parts.shared = SharedExpert<CpuBackend>{
        CpuBackend::load_gptq(context, shared_gate_up.tensors()[0], shared_gate_up.spec(), options),
        CpuBackend::load_gptq(context, shared_down.tensors()[0], shared_down.spec(), options)};
    reference.shared = {shared_gate_up.dense()[0], shared_down.dense()[0]};
  }

  void add_shared_gate() {
    Random random(77);
    for (std::int64_t i = 0; i < kHidden; ++i) {
      parts.shared_gate.push_back(static_cast<float>(random.normal() * 0.3));
    }
    reference.shared_gate = parts.shared_gate;
  }

  static std::optional<DType> bias(bool wanted) {
    return wanted ? std::optional(DType::kFloat16) : std::nullopt;
  }

  Experts gate_up, down, shared_gate_up, shared_down;
  MoeBlockParts<CpuBackend> parts;
  MoeReference reference;
};

struct Input {
  Input(std::int64_t tokens, int top_k, std::int64_t experts, DType dtype, DType id_dtype,
        int percent_absent, std::uint64_t seed)
      : random(seed),
        x(test::random_matrix(tokens, kHidden, dtype, seed + 1, 2)),
        ids(test::random_topk_ids(tokens, top_k, experts, id_dtype, percent_absent, random, 1)),
        weights(test::random_topk_weights(tokens, top_k, random, 3)) {}

  MoeInput view() const {
    return {.x = x.input(), .topk_ids = ids.input(), .topk_weights = weights.input()};
  }

  Random random;
  Matrix x, ids, weights;
};

::testing::AssertionResult block_matches(const Matrix& out, const std::vector<double>& expected,
                                         double bound) {
  if (!out.guards_intact()) return ::testing::AssertionFailure() << "guard bytes have changed";
  if (expected.size() < 256) return ::testing::AssertionFailure() << "too small to be measured";
  return test::within(out.values(), expected, 0, out.cols(), test::bound_for(out.dtype(), bound));
}

class MoeTest : public test::CpuKernelTest {
 protected:
  double bound() const { return test::moe_bound(to_string(GetParam().compute)); }

  CpuBackend::Context context_{2};
};

INSTANTIATE_TEST_SUITE_P(Kernels, MoeTest, ::testing::ValuesIn(test::cpu_kernels()),
                         test::kernel_name);

TEST_P(MoeTest, EveryActivationAndDType) {
  std::uint64_t seed = 10;
  for (const Activation activation :
       {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kClampedSwiglu}) {
    Block block(6, context_, options());
    block.parts.activation = activation;
    block.reference.activation = activation;
    const auto moe = CpuBackend::make_moe_block(context_, block.parts);
    EXPECT_EQ(moe->hidden_size(), kHidden);
    EXPECT_EQ(moe->num_experts(), 6);
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      for (const DType out_dtype : {dtype, DType::kFloat32}) {
        SCOPED_TRACE(::testing::Message() << to_string(activation) << ", " << to_string(dtype)
                                          << " to " << to_string(out_dtype) << ", seed " << seed);
        const Input input(33, 3, 6, dtype, DType::kInt32, 10, seed += 10);
        Matrix out(33, kHidden, out_dtype, 4);
        moe->forward(context_, input.view(), out.view());
        EXPECT_TRUE(block_matches(out, block.reference.forward(input.x, input.ids, input.weights),
                                  bound()));
      }
    }
  }
}

// Values that reach the clamps.
TEST_P(MoeTest, ClampedSwigluClamps) {
  Block block(4, context_, options());
  block.parts.activation = Activation::kClampedSwiglu;
  block.reference.activation = Activation::kClampedSwiglu;
  const auto moe = CpuBackend::make_moe_block(context_, block.parts);
  Input input(20, 2, 4, DType::kFloat32, DType::kInt32, 0, 5);
  Random random(6);
  input.x.fill_normal(random, 40.0);
  Matrix out(20, kHidden, DType::kFloat32);
  moe->forward(context_, input.view(), out.view());
  const std::vector<double> expected = block.reference.forward(input.x, input.ids, input.weights);
  EXPECT_TRUE(block_matches(out, expected, bound()));
  block.reference.activation = Activation::kSilu;
  EXPECT_FALSE(
      block_matches(out, block.reference.forward(input.x, input.ids, input.weights), bound()));
}

TEST_P(MoeTest, EveryTopKWithIdsOfBothWidths) {
  Block block(20, context_, options(), false);
  const auto moe = CpuBackend::make_moe_block(context_, block.parts);
  for (int top_k = 1; top_k <= 16; ++top_k) {
    for (const DType id_dtype : {DType::kInt32, DType::kInt64}) {
      SCOPED_TRACE(::testing::Message() << "top " << top_k << ", " << to_string(id_dtype));
      const Input input(9, top_k, 20, DType::kFloat32, id_dtype, 20,
                        static_cast<std::uint64_t>(top_k));
      Matrix out(9, kHidden, DType::kFloat32);
      moe->forward(context_, input.view(), out.view());
      EXPECT_TRUE(
          block_matches(out, block.reference.forward(input.x, input.ids, input.weights), bound()));
    }
  }
}

TEST_P(MoeTest, AllTokensOnOneExpertAndNoneAnywhere) {
  Block block(5, context_, options());
  const auto moe = CpuBackend::make_moe_block(context_, block.parts);
  for (const double id : {0.0, 4.0, -1.0}) {
    Input input(70, 2, 5, DType::kFloat32, DType::kInt32, 0, 3);
    input.ids.fill(id);
    Matrix out(70, kHidden, DType::kFloat32);
    moe->forward(context_, input.view(), out.view());
    EXPECT_TRUE(
        block_matches(out, block.reference.forward(input.x, input.ids, input.weights), bound()));
  }
}

TEST_P(MoeTest, SharedExpertAndItsGate) {
  for (const bool gate : {false, true}) {
    Block block(4, context_, options());
    block.add_shared_expert(context_, options());
    if (gate) block.add_shared_gate();
    const auto moe = CpuBackend::make_moe_block(context_, block.parts);
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      const Input input(12, 2, 4, dtype, DType::kInt32, 30, 21);
      Matrix out(12, kHidden, dtype);
      moe->forward(context_, input.view(), out.view());
      EXPECT_TRUE(
          block_matches(out, block.reference.forward(input.x, input.ids, input.weights), bound()))
          << "gate " << gate;
    }
  }
}

// A shared expert that the caller ran itself.
TEST_P(MoeTest, SharedOutputOfTheCaller) {
  for (const bool gate : {false, true}) {
    Block block(4, context_, options());
    if (gate) block.add_shared_gate();
    const auto moe = CpuBackend::make_moe_block(context_, block.parts);
    for (const DType shared_dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      const Input input(12, 2, 4, DType::kFloat16, DType::kInt32, 30, 22);
      const Matrix shared = test::random_matrix(12, kHidden, shared_dtype, 23, 1);
      MoeInput view = input.view();
      view.shared_output = shared.input();
      Matrix out(12, kHidden, DType::kFloat32);
      moe->forward(context_, view, out.view());
      EXPECT_TRUE(block_matches(
          out, block.reference.forward(input.x, input.ids, input.weights, &shared), bound()));
    }
  }
}

// Beside every other part, and into the memory that it comes from.
TEST_P(MoeTest, Residual) {
  Block block(4, context_, options());
  block.add_shared_expert(context_, options());
  const auto moe = CpuBackend::make_moe_block(context_, block.parts);
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const DType residual_dtype : {dtype, DType::kFloat32}) {
      const Input input(12, 2, 4, dtype, DType::kInt32, 30, 24);
      Matrix residual = test::random_matrix(12, kHidden, residual_dtype, 25, 1);
      std::vector<double> expected = block.reference.forward(input.x, input.ids, input.weights);
      const std::vector<double> added = residual.values();
      for (std::size_t i = 0; i < expected.size(); ++i) expected[i] += added[i];
      MoeInput view = input.view();
      view.residual = residual.input();
      Matrix out(12, kHidden, dtype, 2);
      moe->forward(context_, view, out.view());
      EXPECT_TRUE(block_matches(out, expected, bound()));
      moe->forward(context_, view, residual.view());
      EXPECT_TRUE(block_matches(residual, expected, bound()));
    }
  }
}

TEST_P(MoeTest, RouterWeightOnTheInput) {
  Block block(4, context_, options());
  block.parts.router_weight = RouterWeight::kOnInput;
  block.reference.router_weight = RouterWeight::kOnInput;
  block.add_shared_expert(context_, options());
  const auto moe = CpuBackend::make_moe_block(context_, block.parts);
  for (const DType dtype : {DType::kFloat32, DType::kFloat16}) {
    const Input input(30, 2, 4, dtype, DType::kInt64, 10, 31);
    Matrix out(30, kHidden, DType::kFloat32);
    moe->forward(context_, input.view(), out.view());
    EXPECT_TRUE(
        block_matches(out, block.reference.forward(input.x, input.ids, input.weights), bound()));
  }
}

TEST_P(MoeTest, BitsDoNotDependOnThreadsRunsOrBatch) {
  Block block(6, context_, options());
  block.add_shared_expert(context_, options());
  block.add_shared_gate();
  const auto moe = CpuBackend::make_moe_block(context_, block.parts);
  const Input input(150, 3, 6, DType::kFloat16, DType::kInt32, 10, 41);
  Matrix first(150, kHidden, DType::kFloat16);
  moe->forward(context_, input.view(), first.view());
  for (const int threads : {1, 2, 3, 5, 8}) {
    CpuBackend::Context context(threads);
    for (int run = 0; run < 2; ++run) {
      Matrix out(150, kHidden, DType::kFloat16);
      moe->forward(context, input.view(), out.view());
      ASSERT_EQ(out.row_bytes(0, 150), first.row_bytes(0, 150)) << threads << " threads";
    }
  }
  for (std::int64_t row = 0; row < 150; row += 17) {
    const auto one = [&](const Matrix& matrix) {
      ConstMatrixView view = matrix.input();
      view.data = static_cast<const char*>(view.data) +
                  static_cast<std::size_t>(row * view.row_stride) * size_of(view.dtype);
      view.rows = 1;
      return view;
    };
    Matrix out(1, kHidden, DType::kFloat16);
    moe->forward(
        context_,
        {.x = one(input.x), .topk_ids = one(input.ids), .topk_weights = one(input.weights)},
        out.view());
    ASSERT_EQ(out.row_bytes(0, 1), first.row_bytes(row, 1)) << "row " << row;
  }
}

TEST_P(MoeTest, NoTokens) {
  Block block(2, context_, options());
  const auto moe = CpuBackend::make_moe_block(context_, block.parts);
  const Input input(0, 2, 2, DType::kFloat32, DType::kInt32, 0, 1);
  Matrix out(0, kHidden, DType::kFloat32);
  EXPECT_NO_THROW(moe->forward(context_, input.view(), out.view()));
}

// --- refusals ---

class MoeRefusalTest : public ::testing::Test {
 protected:
  void parts_refused(std::initializer_list<std::string_view> messages,
                     const MoeBlockParts<CpuBackend>& parts) {
    expect_refused(messages, [&] { CpuBackend::make_moe_block(context, parts); });
  }
  StackPtr stack(std::int64_t experts, std::int64_t k, std::int64_t n) {
    const Experts made = make_experts(experts, 1, {.k = k, .n = n, .group_size = 32});
    return CpuBackend::load_gptq_stacked(context, made.tensors(), made.spec());
  }
  std::shared_ptr<const Linear<CpuBackend>> linear(std::int64_t k, std::int64_t n) {
    const Layer layer = test::make_layer({.k = k, .n = n, .group_size = 32});
    return CpuBackend::load_gptq(context, layer.tensors(), layer.spec());
  }

  CpuBackend::Context context{1};
  Block block{4, context};
};

TEST_F(MoeRefusalTest, PartsThatDoNotFitTogether) {
  MoeBlockParts<CpuBackend> parts = block.parts;
  parts.down = nullptr;
  parts_refused({"gate_up and down are needed"}, parts);
  parts = block.parts;
  parts.gate_up = nullptr;
  parts_refused({"gate_up and down are needed"}, parts);
  parts = block.parts;
  parts.down = stack(4, 72, kHidden);
  parts_refused({"gate_up: n = 160", "expected 2 * k of down = 144"}, parts);
  parts = block.parts;
  parts.down = stack(4, kInner, 64);
  parts_refused({"down: n = 64", "expected k of gate_up = 96"}, parts);
  parts = block.parts;
  parts.down = stack(5, kInner, kHidden);
  parts_refused({"down: 5 experts", "expected 4 as in gate_up"}, parts);
  parts = block.parts;
  parts.shared = {linear(64, 64), linear(32, kHidden)};
  parts_refused({"shared gate_up: k = 64", "expected 96"}, parts);
  parts.shared = {linear(kHidden, 66), linear(32, kHidden)};
  parts_refused({"shared gate_up: n = 66", "expected 2 * k of shared down = 64"}, parts);
  parts.shared = {linear(kHidden, 64), linear(32, 64)};
  parts_refused({"shared down: n = 64", "expected 96"}, parts);
  parts = block.parts;
  parts.shared_gate.assign(95, 0.0F);
  parts_refused({"shared_gate: 95 elements", "expected 96"}, parts);
}

// In a process of its own, since what is not refused here is a null pointer.
TEST_F(MoeRefusalTest, HalfASharedExpert) {
  for (const bool has_gate_up : {false, true}) {
    MoeBlockParts<CpuBackend> parts = block.parts;
    parts.shared = {has_gate_up ? linear(kHidden, 64) : nullptr,
                    has_gate_up ? nullptr : linear(32, kHidden)};
    EXPECT_EXIT(
        {
          parts_refused({"shared"}, parts);
          std::exit(HasFailure() ? 1 : 0);
        },
        ::testing::ExitedWithCode(0), "");
  }
}

TEST_F(MoeRefusalTest, InputsThatDoNotFit) {
  const auto moe = CpuBackend::make_moe_block(context, block.parts);
  Input input(10, 2, 4, DType::kFloat16, DType::kInt32, 0, 1);
  Matrix out(10, kHidden, DType::kFloat16);
  const auto refused = [&](std::initializer_list<std::string_view> messages, auto change) {
    MoeInput view = input.view();
    MatrixView to = out.view();
    change(view, to);
    expect_refused(messages, [&] { moe->forward(context, view, to); });
    EXPECT_TRUE(out.guards_intact(0)) << "something was written before the refusal";
  };
  const Matrix wide(10, 17, DType::kInt32);
  const Matrix shared(10, kHidden, DType::kFloat32);
  refused({"x: 95 columns", "expected 96"}, [](auto& v, auto&) { v.x.cols = 95; });
  refused({"x: dtype int64"}, [](auto& v, auto&) { v.x.dtype = DType::kInt64; });
  refused({"x: null data"}, [](auto& v, auto&) { v.x.data = nullptr; });
  refused({"topk_ids: dtype float32", "int32 or int64"},
          [](auto& v, auto&) { v.topk_ids.dtype = DType::kFloat32; });
  refused({"topk_ids: 9 rows", "expected 10 as in x"}, [](auto& v, auto&) { v.topk_ids.rows = 9; });
  refused({"topk_ids: top_k = 17", "expected 1 to 16"},
          [&](auto& v, auto&) { v.topk_ids = wide.input(); });
  refused({"topk_ids: top_k = 0"}, [](auto& v, auto&) { v.topk_ids.cols = 0; });
  refused({"topk_weights: dtype float16", "float32"},
          [](auto& v, auto&) { v.topk_weights.dtype = DType::kFloat16; });
  refused({"topk_weights: 1 columns", "expected 2"},
          [](auto& v, auto&) { v.topk_weights.cols = 1; });
  refused({"topk_weights: 9 rows", "at least 10"}, [](auto& v, auto&) { v.topk_weights.rows = 9; });
  refused({"shared_output: 95 columns", "expected 96"}, [&](auto& v, auto&) {
    v.shared_output = shared.input();
    v.shared_output->cols = 95;
  });
  const Matrix residual(10, kHidden, DType::kFloat16);
  refused({"residual: 95 columns", "expected 96"}, [&](auto& v, auto&) {
    v.residual = residual.input();
    v.residual->cols = 95;
  });
  refused({"residual: 9 rows", "at least 10"}, [&](auto& v, auto&) {
    v.residual = residual.input();
    v.residual->rows = 9;
  });
  refused({"residual: dtype bfloat16", "the input's float16 or float32"}, [&](auto& v, auto&) {
    v.residual = residual.input();
    v.residual->dtype = DType::kBFloat16;
  });
  refused({"out: 9 rows", "at least 10"}, [](auto&, auto& to) { to.rows = 9; });
  refused({"out: dtype bfloat16", "float16 or float32"},
          [](auto&, auto& to) { to.dtype = DType::kBFloat16; });
  for (const double id : {4.0, -2.0}) {
    input.ids.set(9, 1, id);
    refused({"topk_ids: element [9, 1] is", "expected -1 to 3"}, [](auto&, auto&) {});
  }
}

TEST_F(MoeRefusalTest, TwoSharedExperts) {
  block.add_shared_expert(context);
  const auto moe = CpuBackend::make_moe_block(context, block.parts);
  const Input input(10, 2, 4, DType::kFloat32, DType::kInt32, 0, 1);
  const Matrix shared = test::random_matrix(10, kHidden, DType::kFloat32, 2);
  MoeInput view = input.view();
  view.shared_output = shared.input();
  Matrix out(10, kHidden, DType::kFloat32);
  expect_refused({"shared_output", "runs a shared expert itself"},
                 [&] { moe->forward(context, view, out.view()); });
}

}  // namespace
}  // namespace marlinq
