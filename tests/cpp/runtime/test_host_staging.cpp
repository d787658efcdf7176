// Arrays in host memory for a backend whose memory is elsewhere, and the memory functions of a
// context: through a backend whose "device" is host memory that it watches.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
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
using test::Matrix;

constexpr Device kFar = {DeviceKind::kCuda, 3};

class FarBuffer {
 public:
  FarBuffer() = default;
  FarBuffer(DType dtype, std::int64_t size)
      : words_(static_cast<std::size_t>(size) * size_of(dtype)), dtype_(dtype), size_(size) {}
  Device device() const { return kFar; }
  DType dtype() const { return dtype_; }
  std::int64_t size() const { return size_; }
  void* data() { return words_.data(); }

 private:
  std::vector<unsigned char> words_;
  DType dtype_ = DType::kFloat32;
  std::int64_t size_ = 0;
};

struct FarContext {
  bool capturing = false;
  bool kept = false;
  int waits = 0;
  int stream_value = 0;

  Device device() const { return kFar; }
  int threads() const { return 1; }
  std::int64_t scratch_allocations() const { return 100; }
  void* stream() const { return const_cast<int*>(&stream_value); }
};

struct FarBackend : QuantMarlinDefaults<FarBackend> {
  static constexpr std::string_view kName = "far";
  using Context = FarContext;
  using Buffer = FarBuffer;

  static Buffer allocate(Context&, DType dtype, std::int64_t size) { return {dtype, size}; }
  static void copy(Context&, const ConstMatrixView& from, const MatrixView& to) {
    const auto size = static_cast<std::int64_t>(size_of(to.dtype));
    for (std::int64_t row = 0; row < to.rows; ++row) {
      std::memcpy(static_cast<unsigned char*>(to.data) + row * to.row_stride * size,
                  static_cast<const unsigned char*>(from.data) + row * from.row_stride * size,
                  static_cast<std::size_t>(to.cols * size));
    }
  }
  static void synchronise(Context& context) {
    if (context.capturing) throw Error(ErrorCode::kInvalidArgument, "cannot wait now");
    ++context.waits;
  }
  static bool captured(Context& context) noexcept { return context.kept; }
};

/// Two outputs: the sum of a row's three numbers, and its first number.
class FarLinear final : public Linear<FarBackend> {
 public:
  std::int64_t in_features() const noexcept override { return 3; }
  std::int64_t out_features() const noexcept override { return 2; }
  void forward(FarContext&, const ConstMatrixView& x, const MatrixView& y,
               std::int64_t m) const override {
    check_input(x, "x", kFar, m, 3);
    check_output(y, "out", kFar, m, 2, x.dtype);
    for (std::int64_t i = 0; i < m; ++i) {
      double sum = 0;
      for (std::int64_t j = 0; j < 3; ++j) {
        sum += test::read_element(x.data, x.dtype, i * x.row_stride + j);
      }
      test::write_element(y.data, y.dtype, i * y.row_stride, sum);
      test::write_element(y.data, y.dtype, i * y.row_stride + 1,
                          test::read_element(x.data, x.dtype, i * x.row_stride));
    }
  }
  Description describe() const override { return {}; }
};

double element(const ConstMatrixView& view, std::int64_t row, std::int64_t col) {
  return test::read_element(view.data, view.dtype, row * view.row_stride + col);
}
double element(const ConstArrayView& view, std::int64_t i) {
  return test::read_element(view.data, view.dtype, i);
}

/// Expert e of two: three numbers in, out come their sum times e + 1 and the first one.
class FarStack final : public MarlinExpertStack<FarBackend> {
 public:
  std::int64_t num_experts() const noexcept override { return 2; }
  std::int64_t k() const noexcept override { return 3; }
  std::int64_t n_per_expert() const noexcept override { return 2; }
  std::shared_ptr<const Linear<FarBackend>> expert(std::int64_t) const override {
    return std::make_shared<FarLinear>();
  }
  void gemm_phase_batched(FarContext&, const ConstMatrixView& x,
                          std::span<const ExpertDispatch> dispatches,
                          const MatrixView& y) const override {
    check_batched(x, dispatches, y, kFar, 2, 3, 2);
    for (const ExpertDispatch& d : dispatches) {
      for (std::int64_t i = 0; i < d.rows; ++i) {
        run(x, d.input_row + i, y, d.output_row + i, d.expert, 1);
      }
    }
  }
  void gemm_phase_fused(FarContext&, const ConstMatrixView& x, const FusedTiles& tiles,
                        const MatrixView& y) const override {
    check_fused(x, tiles, y, kFar, 3, 2);
    const auto entries = static_cast<std::int64_t>(element(tiles.num_tokens_past_padded, 0));
    for (std::int64_t i = 0; i < entries; ++i) {
      const auto id = static_cast<std::int64_t>(element(tiles.sorted_token_ids, i));
      if (id >= tiles.num_tokens * tiles.top_k) continue;
      const double weight = tiles.topk_weights ? element(*tiles.topk_weights, id) : 1;
      run(x, id / tiles.top_k, y, id, element(tiles.expert_ids, i / tiles.block_size), weight);
    }
  }
  Description describe() const override { return {}; }

 private:
  static void run(const ConstMatrixView& x, std::int64_t from, const MatrixView& y, std::int64_t to,
                  double expert, double weight) {
    const double here = expert < 0 ? 0 : weight;
    const double sum = element(x, from, 0) + element(x, from, 1) + element(x, from, 2);
    test::write_element(y.data, y.dtype, to * y.row_stride, here * (expert + 1) * sum);
    test::write_element(y.data, y.dtype, to * y.row_stride + 1, here * element(x, from, 0));
  }
};

/// Expert e of two multiplies its token by e + 1.
class FarBlock final : public MoeBlock<FarBackend> {
 public:
  std::int64_t hidden_size() const noexcept override { return 3; }
  std::int64_t num_experts() const noexcept override { return 2; }
  void forward(FarContext&, const MoeInput& in, const MatrixView& y) const override {
    check_moe_input(in, y, kFar, 3, false);
    for (std::int64_t t = 0; t < in.x.rows; ++t) {
      double factor = 0;
      for (std::int64_t s = 0; s < in.topk_ids.cols; ++s) {
        factor += (element(in.topk_ids, t, s) + 1) * element(in.topk_weights, t, s);
      }
      for (std::int64_t j = 0; j < 3; ++j) {
        double value = factor * element(in.x, t, j);
        if (in.shared_output) value += element(*in.shared_output, t, j);
        if (in.residual) value += element(*in.residual, t, j);
        test::write_element(y.data, y.dtype, t * y.row_stride + j, value);
      }
    }
  }
};

class HostStagingTest : public ::testing::Test {
 protected:
  HostStagingTest()
      : model(std::make_shared<detail::ContextModel<FarBackend>>(FarContext{})),
        context(model),
        linear(std::make_shared<detail::LinearModel<FarBackend>>(std::make_shared<FarLinear>())),
        stack(std::make_shared<detail::ExpertStackModel<FarBackend>>(std::make_shared<FarStack>())),
        block(std::make_shared<detail::MoeBlockModel<FarBackend>>(std::make_unique<FarBlock>())) {}

  FarContext& far() { return model->context(); }

  static Matrix counted(std::int64_t rows, DType dtype) {
    Matrix x(rows, 3, dtype, 2);
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < 3; ++j) x.set(i, j, static_cast<double>(10 * i + j));
    }
    return x;
  }
  static void expect_results(const Matrix& out, std::int64_t m) {
    EXPECT_TRUE(out.guards_intact(m));
    for (std::int64_t i = 0; i < m; ++i) {
      EXPECT_EQ(out.at(i, 0), static_cast<double>(30 * i + 3)) << i;
      EXPECT_EQ(out.at(i, 1), static_cast<double>(10 * i)) << i;
    }
  }

  std::shared_ptr<detail::ContextModel<FarBackend>> model;
  ContextHandle context;
  LinearHandle linear;
  ExpertStackHandle stack;
  MoeBlockHandle block;
};

TEST_F(HostStagingTest, BothSidesOnTheHost) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const std::int64_t m : {5, 1, 0, 3}) {
      const Matrix x = counted(5, dtype);
      Matrix out(5, 2, m == 3 ? DType::kFloat32 : dtype, 3);
      linear.forward_host(context, x.input(), out.view(), m);
      expect_results(out, m);
    }
  }
}

TEST_F(HostStagingTest, OneSideOnTheDevice) {
  const Matrix x = counted(4, DType::kFloat32);
  const BufferHandle there = context.allocate(DType::kFloat32, 4 * 3);
  const MatrixView far_x{there.data(), DType::kFloat32, kFar, 4, 3, 3};
  context.copy(x.input(), far_x);
  Matrix out(4, 2, DType::kFloat32);
  linear.forward_host(context, as_const(far_x), out.view(), 4);
  expect_results(out, 4);

  const BufferHandle result = context.allocate(DType::kFloat32, 4 * 2);
  const MatrixView far_y{result.data(), DType::kFloat32, kFar, 4, 2, 2};
  linear.forward_host(context, x.input(), far_y, 4);
  Matrix back(4, 2, DType::kFloat32, 1);
  context.copy(as_const(far_y), back.view());
  expect_results(back, 4);
}

TEST_F(HostStagingTest, ARepeatedSizeAllocatesNothing) {
  const Matrix x = counted(9, DType::kFloat32);
  Matrix out(9, 2, DType::kFloat32);
  EXPECT_EQ(context.scratch_allocations(), 100);
  linear.forward_host(context, x.input(), out.view(), 9);
  EXPECT_EQ(context.scratch_allocations(), 102);
  for (const std::int64_t m : {9, 1, 0, 9}) {
    linear.forward_host(context, x.input(), out.view(), m);
    EXPECT_EQ(context.scratch_allocations(), 102);
  }
}

TEST_F(HostStagingTest, WaitsAndIsRefusedWhereItCannot) {
  const Matrix x = counted(2, DType::kFloat32);
  Matrix out(2, 2, DType::kFloat32);
  linear.forward_host(context, x.input(), out.view(), 2);
  EXPECT_GE(far().waits, 1);
  far().capturing = true;
  Matrix untouched(2, 2, DType::kFloat32);
  const std::int64_t before = context.scratch_allocations();
  expect_refused({"cannot wait now"},
                 [&] { linear.forward_host(context, x.input(), untouched.view(), 2); });
  expect_refused({"cannot wait now"}, [&] { context.synchronise(); });
  EXPECT_TRUE(untouched.guards_intact(0));
  EXPECT_EQ(context.scratch_allocations(), before);
}

TEST_F(HostStagingTest, RefusesWhatDoesNotFit) {
  const Matrix x = counted(2, DType::kFloat32);
  Matrix out(2, 2, DType::kFloat32);
  expect_refused({"x: 2 rows", "at least 3"},
                 [&] { linear.forward_host(context, x.input(), out.view(), 3); });
  expect_refused({"m: -1"}, [&] { linear.forward_host(context, x.input(), out.view(), -1); });
  ConstMatrixView narrow = x.input();
  narrow.cols = 2;
  expect_refused({"x: 2 columns", "expected 3"},
                 [&] { linear.forward_host(context, narrow, out.view(), 2); });
  Matrix wrong(2, 2, DType::kBFloat16);
  expect_refused({"out: dtype bfloat16"},
                 [&] { linear.forward_host(context, x.input(), wrong.view(), 2); });
  ConstMatrixView elsewhere = x.input();
  elsewhere.device = {DeviceKind::kCuda, 1};
  expect_refused({"x: on cuda:1", "expected cuda:3"},
                 [&] { linear.forward_host(context, elsewhere, out.view(), 2); });
  // A forward proper copies nothing.
  expect_refused({"x: on cpu", "expected cuda:3"},
                 [&] { linear.forward(context, x.input(), out.view(), 2); });
  EXPECT_TRUE(out.guards_intact(0));
}

TEST_F(HostStagingTest, BatchedPhaseLeavesOtherRowsAlone) {
  const Matrix x = counted(4, DType::kFloat32);
  const std::vector<ExpertDispatch> dispatches = {
      {.expert = 1, .input_row = 3, .output_row = 0, .rows = 1},
      {.expert = 0, .input_row = 0, .output_row = 3, .rows = 2}};
  Matrix out(6, 2, DType::kFloat32, 3);
  out.fill(-5);
  stack.gemm_phase_batched_host(context, x.input(), dispatches, out.view());
  EXPECT_TRUE(out.guards_intact());
  EXPECT_EQ(out.values(), (std::vector<double>{186, 30, -5, -5, -5, -5, 3, 0, 33, 10, -5, -5}));
  stack.gemm_phase_batched_host(context, x.input(), {}, out.view());
  EXPECT_EQ(out.at(0, 0), 186);
  expect_refused({"dispatches[1]: expert 2", "expected 0 to 1"}, [&] {
    const std::vector<ExpertDispatch> wrong = {dispatches[0], {.expert = 2, .rows = 1}};
    stack.gemm_phase_batched_host(context, x.input(), wrong, out.view());
  });
  expect_refused({"x: on cpu", "expected cuda:3"},
                 [&] { stack.gemm_phase_batched(context, x.input(), dispatches, out.view()); });
}

/// Tiles of 3 tokens with 2 ids each, in host memory: expert 1, expert 0 and "not here".
struct HostTiles {
  HostTiles() : ids(40, 6) {
    ids[0] = 5;
    ids[1] = 0;
    ids[8] = 1;
    ids[9] = 4;
    ids[16] = 2;
    ids[17] = 3;
    std::fill(ids.begin() + 24, ids.end(), -100);  // past the count
  }
  static ConstArrayView array(const void* data, DType dtype, std::size_t size) {
    return {.data = data, .dtype = dtype, .size = static_cast<std::int64_t>(size)};
  }
  FusedTiles view() const {
    return {.sorted_token_ids = array(ids.data(), DType::kInt32, ids.size()),
            .expert_ids = array(experts.data(), DType::kInt32, experts.size()),
            .num_tokens_past_padded = array(&count, DType::kInt32, 1),
            .block_size = 8,
            .top_k = 2,
            .num_tokens = 3,
            .topk_weights = array(weights.data(), DType::kFloat32, weights.size())};
  }

  std::vector<std::int32_t> ids;
  std::vector<std::int32_t> experts = {1, 0, -1, 77, 77};
  std::int32_t count = 24;
  std::vector<float> weights = {1, 2, 3, 4, 5, 6};
};

TEST_F(HostStagingTest, FusedPhase) {
  const Matrix x = counted(4, DType::kFloat32);
  HostTiles tiles;
  Matrix out(7, 2, DType::kFloat32, 3);
  out.fill(-5);
  const std::vector<double> expected = {6, 0, 6, 0, 0, 0, 0, 0, 315, 100, 756, 120, -5, -5};
  stack.gemm_phase_fused_host(context, x.input(), tiles.view(), out.view());
  EXPECT_TRUE(out.guards_intact());
  EXPECT_EQ(out.values(), expected);

  // Lists on the device beside x and out of the host.
  const BufferHandle there = context.allocate(DType::kInt32, 40);
  const auto words = [](const void* data, Device device) {
    return ConstMatrixView{data, DType::kInt32, device, 1, 40, 40};
  };
  context.copy(words(tiles.ids.data(), {}), {there.data(), DType::kInt32, kFar, 1, 40, 40});
  FusedTiles mixed = tiles.view();
  mixed.sorted_token_ids.data = there.data();
  mixed.sorted_token_ids.device = kFar;
  out.fill(-5);
  stack.gemm_phase_fused_host(context, x.input(), mixed, out.view());
  EXPECT_EQ(out.values(), expected);
  const std::int64_t grown = context.scratch_allocations();
  stack.gemm_phase_fused_host(context, x.input(), tiles.view(), out.view());
  stack.gemm_phase_fused_host(context, x.input(), mixed, out.view());
  EXPECT_EQ(context.scratch_allocations(), grown);
}

TEST_F(HostStagingTest, TilesOnTheHostAreCheckedThere) {
  const Matrix x = counted(3, DType::kFloat32);
  Matrix out(6, 2, DType::kFloat32);
  const auto refused = [&](std::initializer_list<std::string_view> messages, auto change) {
    HostTiles tiles;
    change(tiles);
    expect_refused(messages, [&] {
      stack.gemm_phase_fused_host(context, x.input(), tiles.view(), out.view());
    });
  };
  refused({"num_tokens_past_padded: 25", "a multiple of block_size = 8"},
          [](HostTiles& tiles) { tiles.count = 25; });
  refused({"num_tokens_past_padded: 48", "sorted_token_ids (40)"},
          [](HostTiles& tiles) { tiles.count = 48; });
  refused({"expert_ids: element [1] is 2", "expected -1 to 1"},
          [](HostTiles& tiles) { tiles.experts[1] = 2; });
  refused({"sorted_token_ids: element [3] is -1"}, [](HostTiles& tiles) { tiles.ids[3] = -1; });
  refused({"topk_weights: 5 elements", "at least 6"},
          [](HostTiles& tiles) { tiles.weights.pop_back(); });
  EXPECT_TRUE(out.guards_intact(0));
}

TEST_F(HostStagingTest, Blocks) {
  const Matrix x = counted(2, DType::kFloat16);
  for (const DType id_dtype : {DType::kInt32, DType::kInt64}) {
    Matrix ids(2, 2, id_dtype, 1);
    ids.set(0, 0, 1);
    ids.set(0, 1, -1);
    ids.set(1, 0, 0);
    ids.set(1, 1, 1);
    Matrix weights(2, 2, DType::kFloat32, 2);
    weights.fill(0.5);
    const MoeInput plain{.x = x.input(), .topk_ids = ids.input(), .topk_weights = weights.input()};
    Matrix out(3, 3, DType::kFloat32, 1);
    block.forward_host(context, plain, out.view());
    EXPECT_TRUE(out.guards_intact(2));
    EXPECT_EQ(out.values(2), (std::vector<double>{0, 1, 2, 15, 16.5, 18}));

    Matrix shared(2, 3, DType::kBFloat16);
    shared.fill(2);
    Matrix residual(2, 3, DType::kFloat16, 4);
    residual.fill(100);
    MoeInput input = plain;
    input.shared_output = shared.input();
    input.residual = residual.input();
    block.forward_host(context, input, residual.view());
    EXPECT_TRUE(residual.guards_intact());
    EXPECT_EQ(residual.values(), (std::vector<double>{102, 103, 104, 117, 118.5, 120}));

    const std::int64_t grown = context.scratch_allocations();
    block.forward_host(context, input, out.view());
    EXPECT_EQ(context.scratch_allocations(), grown);

    ids.set(1, 1, 2);
    expect_refused({"topk_ids: element [1, 1] is 2", "expected -1 to 1"},
                   [&] { block.forward_host(context, input, out.view()); });
    expect_refused({"x: on cpu", "expected cuda:3"},
                   [&] { block.forward(context, input, out.view()); });
  }
  far().capturing = true;
  Matrix ids(2, 1, DType::kInt32);
  ids.fill(0);
  Matrix weights(2, 1, DType::kFloat32);
  weights.fill(1);
  Matrix out(2, 3, DType::kFloat32);
  const MoeInput input{.x = x.input(), .topk_ids = ids.input(), .topk_weights = weights.input()};
  expect_refused({"cannot wait now"}, [&] { block.forward_host(context, input, out.view()); });
  EXPECT_TRUE(out.guards_intact(0));
}

// The same functions where the host's memory is the device's.
TEST(HostCallsOnTheCpuTest, AreTheCallsThemselves) {
  const ContextHandle cpu = open_context({}, {.threads = 1});
  const test::Experts gate_up = test::make_experts(3, 2, {.k = 64, .n = 32, .group_size = 32});
  const test::Experts down = test::make_experts(3, 1, {.k = 32, .n = 64, .group_size = 32});
  const ExpertStackHandle stack = cpu.load_gptq_stacked(gate_up.tensors(), gate_up.spec());
  const MoeBlockHandle moe = cpu.make_moe_block(
      {.gate_up = stack, .down = cpu.load_gptq_stacked(down.tensors(), down.spec())});
  const Matrix x = test::random_matrix(6, 64, DType::kFloat32, 1);
  test::Random random(3);
  const Matrix ids = test::random_topk_ids(6, 2, 3, DType::kInt32, 20, random);
  const Matrix weights = test::random_topk_weights(6, 2, random);
  const MoeInput input{.x = x.input(), .topk_ids = ids.input(), .topk_weights = weights.input()};
  Matrix wanted(6, 64, DType::kFloat32);
  Matrix out(6, 64, DType::kFloat32);
  moe.forward(cpu, input, wanted.view());
  moe.forward_host(cpu, input, out.view());
  EXPECT_EQ(out.values(), wanted.values());

  const std::vector<ExpertDispatch> dispatches = {
      {.expert = 2, .input_row = 1, .output_row = 0, .rows = 5}};
  stack.gemm_phase_batched(cpu, x.input(), dispatches, wanted.view());
  stack.gemm_phase_batched_host(cpu, x.input(), dispatches, out.view());
  EXPECT_EQ(out.values(5), wanted.values(5));

  const TokenTiles lists = moe_align_block_size(ids.input(), 8, 3);
  const FusedTiles tiles{
      .sorted_token_ids = HostTiles::array(lists.sorted_token_ids.data(), DType::kInt32,
                                           lists.sorted_token_ids.size()),
      .expert_ids =
          HostTiles::array(lists.expert_ids.data(), DType::kInt32, lists.expert_ids.size()),
      .num_tokens_past_padded = HostTiles::array(&lists.num_tokens_past_padded, DType::kInt32, 1),
      .block_size = 8,
      .top_k = 2,
      .num_tokens = 6,
      .topk_weights = std::nullopt};
  Matrix fused(12, 64, DType::kFloat32);
  Matrix fused_host(12, 64, DType::kFloat32);
  stack.gemm_phase_fused(cpu, x.input(), tiles, fused.view());
  stack.gemm_phase_fused_host(cpu, x.input(), tiles, fused_host.view());
  EXPECT_EQ(fused_host.values(), fused.values());
}

TEST_F(HostStagingTest, CopiesAreChecked) {
  const Matrix from = counted(2, DType::kFloat32);
  Matrix to(2, 3, DType::kFloat32);
  const BufferHandle buffer = context.allocate(DType::kFloat32, 6);
  EXPECT_EQ(buffer.device(), kFar);
  EXPECT_EQ(buffer.dtype(), DType::kFloat32);
  EXPECT_EQ(buffer.size(), 6);
  expect_refused({"size: -1"}, [&] { context.allocate(DType::kFloat32, -1); });
  Matrix other(2, 3, DType::kFloat16);
  expect_refused({"from: dtype float32", "float16"},
                 [&] { context.copy(from.input(), other.view()); });
  Matrix longer(3, 3, DType::kFloat32);
  expect_refused({"from: 2 rows", "at least 3"},
                 [&] { context.copy(from.input(), longer.view()); });
  Matrix wider(2, 4, DType::kFloat32);
  expect_refused({"from: 3 columns", "expected 4"},
                 [&] { context.copy(from.input(), wider.view()); });
  MatrixView elsewhere = to.view();
  elsewhere.device = {DeviceKind::kCuda, 4};
  expect_refused({"to: on cuda:4", "expected cuda:3"},
                 [&] { context.copy(from.input(), elsewhere); });
  context.copy(from.input(), to.view());
  EXPECT_EQ(to.values(), from.values());
}

TEST_F(HostStagingTest, ContextsTellOfTheirStreamAndOfGraphs) {
  EXPECT_NE(context.stream(), nullptr);
  EXPECT_FALSE(context.captured());
  far().kept = true;
  EXPECT_TRUE(context.captured());
  const ContextHandle cpu = open_context({});
  EXPECT_EQ(cpu.stream(), nullptr);
  EXPECT_FALSE(cpu.captured());
}

TEST(CpuMemoryTest, AllocatesZerosAndCopiesRows) {
  const ContextHandle cpu = open_context({}, {.threads = 1});
  const BufferHandle buffer = cpu.allocate(DType::kFloat32, 12);
  const MatrixView zeros{buffer.data(), DType::kFloat32, {}, 3, 4, 4};
  Matrix host(3, 4, DType::kFloat32, 5);
  cpu.copy(as_const(zeros), host.view());
  EXPECT_TRUE(host.guards_intact());
  EXPECT_EQ(host.values(), std::vector<double>(12, 0.0));
  cpu.synchronise();
}

TEST(NullMemoryTest, DefaultsNameBackendAndOperation) {
  test::NullContext context;
  expect_error(ErrorCode::kUnsupported, {"backend 'null'", "allocate"},
               [&] { test::NullBackend::allocate(context, DType::kFloat32, 1); });
  expect_error(ErrorCode::kUnsupported, {"backend 'null'", "copy"},
               [&] { test::NullBackend::copy(context, {}, {}); });
  expect_error(ErrorCode::kUnsupported, {"backend 'null'", "synchronise"},
               [&] { test::NullBackend::synchronise(context); });
  EXPECT_FALSE(test::NullBackend::captured(context));
}

}  // namespace
}  // namespace marlinq
