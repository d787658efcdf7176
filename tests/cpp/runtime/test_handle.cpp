// The handles: what is erased stays what it was, backends do not mix, and errors leave everything
// usable.
#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "marlinq/handle.hpp"
#include "marlinq/registry.hpp"
#include "runtime/erased.hpp"
#include "support/compare.hpp"
#include "support/moe_reference.hpp"
#include "support/null_backend.hpp"

namespace marlinq {
namespace {

using test::expect_error;
using test::expect_refused;
using test::Experts;
using test::Layer;
using test::make_layer;
using test::Matrix;
using test::NullBackend;
using test::NullContext;
using test::Order;
using test::Zeros;

// --- a second backend, so that there is something to mix up ---

class NullLinear final : public Linear<NullBackend> {
 public:
  std::int64_t in_features() const noexcept override { return 64; }
  std::int64_t out_features() const noexcept override { return 32; }
  void forward(NullContext&, const ConstMatrixView&, const MatrixView&,
               std::int64_t) const override {}
  Description describe() const override { return {}; }
};

class NullStack final : public MarlinExpertStack<NullBackend> {
 public:
  std::int64_t num_experts() const noexcept override { return 2; }
  std::int64_t k() const noexcept override { return 64; }
  std::int64_t n_per_expert() const noexcept override { return 32; }
  std::shared_ptr<const Linear<NullBackend>> expert(std::int64_t) const override {
    return std::make_shared<NullLinear>();
  }
  void gemm_phase_batched(NullContext&, const ConstMatrixView&, std::span<const ExpertDispatch>,
                          const MatrixView&) const override {}
  void gemm_phase_fused(NullContext&, const ConstMatrixView&, const FusedTiles&,
                        const MatrixView&) const override {}
  Description describe() const override { return {}; }
};

ContextHandle null_context() {
  return ContextHandle(std::make_shared<detail::ContextModel<NullBackend>>(NullContext{}));
}
LinearHandle null_linear() {
  return LinearHandle(
      std::make_shared<detail::LinearModel<NullBackend>>(std::make_shared<NullLinear>()));
}
ExpertStackHandle null_stack() {
  return ExpertStackHandle(
      std::make_shared<detail::ExpertStackModel<NullBackend>>(std::make_shared<NullStack>()));
}

// The compute type with the least error.
const LoadOptions kExact{.compute = Compute::kFloat32};

class HandleTest : public ::testing::Test {
 protected:
  HandleTest()
      : layer(make_layer({.k = 64, .n = 32, .group_size = 32, .order = Order::kActOrder})),
        gate_up(test::make_experts(3, 2, {.k = 64, .n = 32, .group_size = 32, .seed = 20})),
        down(test::make_experts(3, 1, {.k = 32, .n = 64, .group_size = 32, .seed = 40})),
        cpu(open_context({}, {.threads = 2})),
        linear(cpu.load_gptq(layer.tensors(), layer.spec(), kExact)) {}

  ExpertStackHandle load(const Experts& experts) const {
    return cpu.load_gptq_stacked(experts.tensors(), experts.spec(), kExact);
  }
  MoeBlockSpec block_spec() const { return {.gate_up = load(gate_up), .down = load(down)}; }

  ::testing::AssertionResult linear_works(const ContextHandle& context) const {
    const Matrix x = test::random_matrix(9, 64, DType::kFloat32, 1);
    Matrix out(9, 32, DType::kFloat32);
    linear.forward(context, x.input(), out.view(), 9);
    return test::matches(out, test::multiply(x.values(), 9, layer.dense()), 9);
  }

  Layer layer;
  Experts gate_up, down;
  ContextHandle cpu;
  LinearHandle linear;
};

TEST_F(HandleTest, AContextInUseIsRefused) {
  const ContextHandle context = null_context();
  auto& model = static_cast<detail::ContextModel<NullBackend>&>(context.any());
  {
    const detail::ContextUse use(model.busy());
    expect_refused({"context: in use by another thread", "one context per thread"},
                   [&] { context.pregrow_marlin_gather_scratch(1); });
  }
  context.pregrow_marlin_gather_scratch(1);
}

TEST_F(HandleTest, TellWhatTheyHold) {
  EXPECT_EQ(cpu.backend(), "cpu");
  EXPECT_EQ(cpu.threads(), 2);
  EXPECT_EQ(cpu.device(), Device{});
  EXPECT_EQ(linear.backend(), "cpu");
  EXPECT_EQ(linear.in_features(), 64);
  EXPECT_EQ(linear.out_features(), 32);
  EXPECT_EQ(linear.describe().backend, "cpu");
  const ExpertStackHandle stack = load(gate_up);
  EXPECT_EQ(stack.backend(), "cpu");
  EXPECT_EQ(stack.num_experts(), 3);
  EXPECT_EQ(stack.k(), 64);
  EXPECT_EQ(stack.n_per_expert(), 64);
  EXPECT_EQ(stack.describe().num_experts, 3);
  EXPECT_EQ(stack.expert(2).out_features(), 64);
  const MoeBlockHandle block = cpu.make_moe_block(block_spec());
  EXPECT_EQ(block.backend(), "cpu");
  EXPECT_EQ(block.hidden_size(), 64);
  EXPECT_EQ(block.num_experts(), 3);
}

TEST_F(HandleTest, PeakRates) {
  for (const Compute compute :
       {Compute::kAuto, Compute::kFloat32, Compute::kInt16, Compute::kBFloat16, Compute::kInt8}) {
    EXPECT_GT(cpu.peak_rate({.compute = compute}), 1e8) << to_string(compute);
  }
  EXPECT_GT(cpu.peak_rate({.kernel = "generic"}), 1e8);
  expect_error(ErrorCode::kInvalidArgument, {"kernel: 'fast'", "generic"},
               [&] { cpu.peak_rate({.kernel = "fast"}); });
  EXPECT_EQ(null_context().peak_rate({}), 0.0);
}

TEST_F(HandleTest, CopiesShareTheWeightAndOutliveTheOriginal) {
  std::optional<ContextHandle> loader = open_context({}, {.threads = 1});
  std::optional<LinearHandle> original = loader->load_gptq(layer.tensors(), layer.spec(), kExact);
  linear = *original;
  original.reset();
  loader.reset();  // not even the context that loaded it is needed
  EXPECT_TRUE(linear_works(cpu));
}

TEST_F(HandleTest, AnExpertOutlivesItsStack) {
  const auto view = std::make_unique<LinearHandle>(load(gate_up).expert(1));
  const Matrix x = test::random_matrix(9, 64, DType::kFloat32, 1);
  Matrix out(9, 64, DType::kFloat32);
  view->forward(cpu, x.input(), out.view(), 9);
  EXPECT_TRUE(test::matches(out, test::multiply(x.values(), 9, gate_up.dense()[1]), 9));
}

// --- routing through a context ---

ArrayView list_of(std::vector<std::int32_t>& values) {
  return {.data = values.data(), .size = static_cast<std::int64_t>(values.size())};
}

TEST_F(HandleTest, AlignsIntoTheCallersLists) {
  Matrix ids(5, 2, DType::kInt64, 3);
  const std::vector<double> values = {2, 0, -1, 2, 2, 1, 0, 2, 2, -1};
  for (int i = 0; i < 10; ++i) ids.set(i / 2, i % 2, values[static_cast<std::size_t>(i)]);
  ASSERT_EQ(most_aligned_ids(10, 8, 3), 32);
  std::vector<std::int32_t> tokens(40, -7);
  std::vector<std::int32_t> experts(6, -7);
  std::vector<std::int32_t> past(1);
  const std::vector<std::int32_t> map = {5, -1, 9};
  const auto align = [&](const ConstArrayView& expert_map) {
    cpu.moe_align_block_size(ids.input(), 8, 3, expert_map, list_of(tokens), list_of(experts),
                             list_of(past));
  };
  align({});
  EXPECT_EQ(tokens, (std::vector<std::int32_t>{1,  6,  10, 10, 10, 10, 10, 10, 5,  10,  //
                                               10, 10, 10, 10, 10, 10, 0,  3,  4,  7,   //
                                               8,  10, 10, 10, 2,  9,  10, 10, 10, 10,  //
                                               10, 10, 10, 10, 10, 10, 10, 10, 10, 10}));
  EXPECT_EQ(experts, (std::vector<std::int32_t>{0, 1, 2, -1, -1, -1}));
  EXPECT_EQ(past[0], 32);
  align({.data = map.data(), .size = 3});
  EXPECT_EQ(experts, (std::vector<std::int32_t>{5, -1, 9, -1, -1, -1}));
}

TEST_F(HandleTest, ListsWithoutRoomAreRefused) {
  Matrix ids(5, 2, DType::kInt32);
  ids.fill(0);
  std::vector<std::int32_t> tokens(32);
  std::vector<std::int32_t> experts(4);
  std::vector<std::int32_t> past(1);
  const auto refused = [&](std::initializer_list<std::string_view> parts, ConstArrayView map,
                           ArrayView token_list, ArrayView expert_list, ArrayView count) {
    expect_refused(parts, [&] {
      cpu.moe_align_block_size(ids.input(), 8, 3, map, token_list, expert_list, count);
    });
  };
  const ArrayView a = list_of(tokens);
  const ArrayView b = list_of(experts);
  const ArrayView c = list_of(past);
  const auto with = [](ArrayView view, auto change) {
    change(view);
    return view;
  };
  const auto shorter = [](ArrayView& view) { --view.size; };
  const auto elsewhere = [](ArrayView& view) { view.device = {DeviceKind::kCuda, 0}; };
  const auto wide = [](ArrayView& view) { view.dtype = DType::kInt64; };
  const auto null = [](ArrayView& view) { view.data = nullptr; };
  refused({"sorted_token_ids: 31 elements, expected at least 32"}, {}, with(a, shorter), b, c);
  refused({"sorted_token_ids: on cuda:0, expected cpu"}, {}, with(a, elsewhere), b, c);
  refused({"sorted_token_ids: null data"}, {}, with(a, null), b, c);
  refused({"expert_ids: 3 elements, expected at least 4"}, {}, a, with(b, shorter), c);
  refused({"expert_ids: dtype int64, expected int32"}, {}, a, with(b, wide), c);
  refused({"num_tokens_past_padded: 0 elements, expected at least 1"}, {}, a, b, with(c, shorter));
  refused({"expert_map: 4 elements, expected 3"}, as_const(b), a, b, c);
  refused({"expert_map: dtype int64, expected int32"}, as_const(with(with(b, shorter), wide)), a, b,
          c);
  refused({"expert_map: on cuda:0, expected cpu"}, as_const(with(with(b, shorter), elsewhere)), a,
          b, c);
}

// --- the defaults of the trait, behind a handle ---

TEST_F(HandleTest, ABackendThatOverridesNothing) {
  const ContextHandle context = null_context();
  EXPECT_EQ(context.backend(), "null");
  EXPECT_EQ(to_string(context.device()), "cuda:3");
  expect_error(ErrorCode::kUnsupported, {"'null'", "load_gptq"},
               [&] { context.load_gptq(layer.tensors(), layer.spec()); });
  expect_error(ErrorCode::kUnsupported, {"'null'", "load_gptq_stacked"},
               [&] { context.load_gptq_stacked(gate_up.tensors(), gate_up.spec()); });
  expect_error(ErrorCode::kUnsupported, {"'null'", "route"},
               [&] { context.route({}, {}, {}, {}); });
  expect_error(ErrorCode::kUnsupported, {"'null'", "moe_align_block_size"},
               [&] { context.moe_align_block_size({}, 8, 1, {}, {}, {}, {}); });
  expect_error(ErrorCode::kUnsupported, {"'null'", "make_moe_block"},
               [&] { context.make_moe_block({.gate_up = null_stack(), .down = null_stack()}); });
  EXPECT_NO_THROW(context.pregrow_marlin_gather_scratch(1 << 20));
}

// --- backends do not mix ---

TEST_F(HandleTest, AContextOfAnotherBackendIsRefused) {
  const Matrix x = test::random_matrix(1, 64, DType::kFloat32, 1);
  Matrix out(1, 32, DType::kFloat32);
  expect_refused({"context", "'null'", "expected 'cpu'"},
                 [&] { linear.forward(null_context(), x.input(), out.view(), 1); });
  expect_refused({"context", "'cpu'", "expected 'null'"},
                 [&] { null_linear().forward(cpu, x.input(), out.view(), 1); });
  const ExpertStackHandle stack = load(gate_up);
  expect_refused({"context", "'null'", "expected 'cpu'"},
                 [&] { stack.gemm_phase_batched(null_context(), x.input(), {}, out.view()); });
  expect_refused({"context", "'null'", "expected 'cpu'"},
                 [&] { stack.gemm_phase_fused(null_context(), x.input(), {}, out.view()); });
  const MoeBlockHandle block = cpu.make_moe_block(block_spec());
  expect_refused({"context", "'null'", "expected 'cpu'"},
                 [&] { block.forward(null_context(), {}, out.view()); });
  EXPECT_TRUE(out.guards_intact(0));
}

TEST_F(HandleTest, ABlockOfPartsOfAnotherBackendIsRefused) {
  MoeBlockSpec spec = block_spec();
  spec.gate_up = null_stack();
  expect_refused({"gate_up", "'null'", "expected 'cpu'"}, [&] { cpu.make_moe_block(spec); });
  spec = block_spec();
  spec.down = null_stack();
  expect_refused({"down", "'null'", "expected 'cpu'"}, [&] { cpu.make_moe_block(spec); });
  spec = block_spec();
  spec.shared_gate_up = null_linear();
  spec.shared_down = linear;
  expect_refused({"shared gate_up", "'null'"}, [&] { cpu.make_moe_block(spec); });
  std::swap(spec.shared_gate_up, spec.shared_down);
  expect_refused({"shared down", "'null'"}, [&] { cpu.make_moe_block(spec); });
}

TEST_F(HandleTest, HalfASharedExpertIsRefused) {
  MoeBlockSpec spec = block_spec();
  spec.shared_down = linear;
  expect_refused({"shared expert", "only one was given"}, [&] { cpu.make_moe_block(spec); });
  std::swap(spec.shared_gate_up, spec.shared_down);
  expect_refused({"shared expert", "only one was given"}, [&] { cpu.make_moe_block(spec); });
}

// --- memory that runs out anywhere is marlinq's own error ---

template <class Exception>
struct FailingBackend : QuantMarlinDefaults<FailingBackend<Exception>> {
  static constexpr std::string_view kName = "failing";
  using Context = NullContext;
  using Buffer = test::NullBuffer;

  [[noreturn]] static void fail() {
    if constexpr (std::is_same_v<Exception, std::length_error>) {
      throw std::length_error("too long");
    } else {
      throw Exception();
    }
  }
  static std::unique_ptr<Linear<FailingBackend>> load_gptq(Context&, const GptqTensors&,
                                                           const GptqSpec&, const LoadOptions&) {
    fail();
  }
  static void pregrow_marlin_gather_scratch(Context&, std::int64_t) { fail(); }
};

template <class B>
void expect_out_of_memory() {
  const ContextHandle context(std::make_shared<detail::ContextModel<B>>(NullContext{}));
  expect_error(ErrorCode::kOutOfMemory, {"out of host memory"}, [&] { context.load_gptq({}, {}); });
  expect_error(ErrorCode::kOutOfMemory, {"out of host memory"},
               [&] { context.pregrow_marlin_gather_scratch(1); });
}

TEST(OutOfMemoryTest, IsTranslated) {
  expect_out_of_memory<FailingBackend<std::bad_alloc>>();
  expect_out_of_memory<FailingBackend<std::length_error>>();
}

// --- after an error ---

TEST_F(HandleTest, EverythingStaysUsableAfterErrors) {
  const MoeBlockHandle block = cpu.make_moe_block(block_spec());
  const Matrix x = test::random_matrix(6, 64, DType::kFloat32, 1);
  Matrix out(6, 64, DType::kFloat32);
  test::Random random(3);
  Matrix ids = test::random_topk_ids(6, 2, 3, DType::kInt32, 0, random);
  const Matrix weights = test::random_topk_weights(6, 2, random);
  const MoeInput input{.x = x.input(), .topk_ids = ids.input(), .topk_weights = weights.input()};
  const double right = ids.at(5, 1);

  for (int round = 0; round < 3; ++round) {
    expect_refused({"bits"}, [&] { cpu.load_gptq(layer.tensors(), {.bits = 5}); });
    expect_refused({"experts"}, [&] { cpu.load_gptq_stacked({}, layer.spec()); });
    expect_refused({"m: -1"}, [&] { linear.forward(cpu, x.input(), out.view(), -1); });
    expect_error(ErrorCode::kOutOfMemory, {},
                 [&] { cpu.pregrow_marlin_gather_scratch(std::int64_t{1} << 58); });
    ids.set(5, 1, 3);
    expect_refused({"topk_ids"}, [&] { block.forward(cpu, input, out.view()); });
    ids.set(5, 1, right);

    EXPECT_TRUE(linear_works(cpu));
    block.forward(cpu, input, out.view());
    test::MoeReference reference;
    reference.gate_up = gate_up.dense();
    reference.down = down.dense();
    EXPECT_TRUE(test::within(out.values(), reference.forward(x, ids, weights), 0, 64,
                             test::tolerances::kMoeFloat32));
  }
}

// --- threads ---

// One weight, many contexts at once: the results are those of one.
TEST_F(HandleTest, ThreadsShareAWeight) {
  const Layer wide = make_layer({.k = 256,
                                 .n = 200,
                                 .group_size = 64,
                                 .zeros = Zeros::kAsymmetricV1,
                                 .order = Order::kActOrder});
  const LinearHandle shared = cpu.load_gptq(wide.tensors(), wide.spec());
  const MoeBlockHandle block = cpu.make_moe_block(block_spec());
  const Matrix x = test::random_matrix(70, 256, DType::kFloat16, 1);
  Matrix expected(70, 200, DType::kFloat16);
  shared.forward(cpu, x.input(), expected.view(), 70);
  const Matrix tokens = test::random_matrix(40, 64, DType::kFloat32, 2);
  test::Random random(4);
  const Matrix ids = test::random_topk_ids(40, 2, 3, DType::kInt64, 10, random);
  const Matrix weights = test::random_topk_weights(40, 2, random);
  const MoeInput input{
      .x = tokens.input(), .topk_ids = ids.input(), .topk_weights = weights.input()};
  Matrix expected_block(40, 64, DType::kFloat32);
  block.forward(cpu, input, expected_block.view());

  constexpr int kThreads = 4;
  std::vector<int> wrong(kThreads, 0);
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      const ContextHandle own = open_context({}, {.threads = 1 + i % 2});
      for (int round = 0; round < 10; ++round) {
        Matrix out(70, 200, DType::kFloat16);
        shared.forward(own, x.input(), out.view(), 70);
        Matrix out_block(40, 64, DType::kFloat32);
        block.forward(own, input, out_block.view());
        if (out.row_bytes(0, 70) != expected.row_bytes(0, 70) ||
            out_block.row_bytes(0, 40) != expected_block.row_bytes(0, 40)) {
          ++wrong[static_cast<std::size_t>(i)];
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(kThreads, 0));
}

TEST_F(HandleTest, ThreadsLoadAtTheSameTime) {
  std::vector<int> right(4, 0);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < right.size(); ++i) {
    threads.emplace_back([&, i] {
      const ContextHandle own = open_context({}, {.threads = 1});
      const LinearHandle mine = own.load_gptq(layer.tensors(), layer.spec(), kExact);
      const Matrix x = test::random_matrix(9, 64, DType::kFloat32, i);
      Matrix out(9, 32, DType::kFloat32);
      mine.forward(own, x.input(), out.view(), 9);
      right[i] = test::matches(out, test::multiply(x.values(), 9, layer.dense()), 9) ? 1 : 0;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(right, std::vector<int>(4, 1));
}

}  // namespace
}  // namespace marlinq
