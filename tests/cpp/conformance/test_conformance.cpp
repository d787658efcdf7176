// What every backend must do, through handles alone: one run for each device and kernel that this
// build and machine have. A new backend takes part as soon as it is registered.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "marlinq/handle.hpp"
#include "marlinq/registry.hpp"
#include "support/compare.hpp"
#include "support/device_matrix.hpp"
#include "support/moe_reference.hpp"

namespace marlinq {
namespace {

using test::Dense;
using test::DeviceMatrix;
using test::expect_error;
using test::expect_refused;
using test::Experts;
using test::Layer;
using test::LayerOptions;
using test::make_layer;
using test::Matrix;
using test::Order;
using test::Zeros;

struct Target {
  std::string backend;
  std::string device;
  std::string kernel;
  bool usable = true;

  friend std::ostream& operator<<(std::ostream& out, const Target& t) {
    return out << t.backend << " on " << t.device << ", kernel " << t.kernel;
  }
};

std::vector<Target> targets() {
  std::vector<Target> all;
  for (const BackendInfo& info : backends()) {
    for (const std::string& device : info.devices) {
      for (const KernelInfo& kernel : info.kernels) {
        all.push_back({info.name, device, kernel.name, kernel.usable});
      }
    }
    if (info.devices.empty()) all.push_back({info.name, "", "", false});
  }
  return all;
}

// What a backend does not do yet. It has to say so, and a backend that learns it fails here.
constexpr std::array<std::pair<std::string_view, std::string_view>, 0> kLacking = {};

class ConformanceTest : public ::testing::TestWithParam<Target> {
 protected:
  void SetUp() override {
    if (GetParam().device.empty()) GTEST_SKIP() << GetParam().backend << " has no device here";
    context_.emplace(open_context(parse_device(GetParam().device), {.threads = 2}));
    options_.kernel = GetParam().kernel;
    if (!GetParam().usable) {
      // Asking for a kernel that the machine lacks is an error, not another kernel.
      const Layer layer = make_layer({.k = 64, .n = 16});
      expect_error(ErrorCode::kUnsupported, {GetParam().kernel},
                   [&] { load(layer.tensors(), layer.spec()); });
      GTEST_SKIP() << "this machine cannot run " << GetParam();
    }
  }

  const ContextHandle& context() const { return *context_; }
  LinearHandle load(const GptqTensors& tensors, const GptqSpec& spec) const {
    return context_->load_gptq(tensors, spec, options_);
  }
  ExpertStackHandle load(const Experts& experts) const {
    return context_->load_gptq_stacked(experts.tensors(), experts.spec(), options_);
  }

  bool lacks(std::string_view operation) const {
    return std::find(kLacking.begin(), kLacking.end(),
                     std::pair(std::string_view(GetParam().backend), operation)) != kLacking.end();
  }
  /// Calls f, which must be refused as an operation that the backend does not have.
  void expect_lacking(std::string_view operation, test::Call f) const {
    expect_error(
        ErrorCode::kUnsupported,
        {"backend '" + GetParam().backend + "' does not support " + std::string(operation)}, f);
  }

  /// The numbers that the backend computes with: a GPU rounds float32 to float16.
  std::vector<double> computed_with(const Matrix& x) const {
    if (on_cpu() || x.dtype() != DType::kFloat32) return x.values();
    Matrix rounded(x.rows(), x.cols(), DType::kFloat16);
    for (std::int64_t i = 0; i < x.rows(); ++i) {
      for (std::int64_t j = 0; j < x.cols(); ++j) rounded.set(i, j, x.at(i, j));
    }
    return rounded.values();
  }
  ::testing::AssertionResult matches(const Matrix& out, const test::Product& expected,
                                     std::int64_t m, DType x) const {
    if (on_cpu()) return test::matches(out, expected, m, test::linear_bound(cpu_compute()));
    return test::matches_within(
        out, expected, m,
        x == DType::kBFloat16 ? test::tolerances::kCudaBfloat16 : test::tolerances::kCudaFloat16);
  }
  /// Of a block with float16 activations and a float32 output.
  double block_bound() const {
    return on_cpu() ? test::moe_bound(cpu_compute()) : test::tolerances::kCudaMoeFloat16;
  }

  /// What compute "auto" means on the CPU with this kernel.
  std::string cpu_compute() const {
    const Layer layer = make_layer({.k = 64, .n = 16});
    return load(layer.tensors(), layer.spec()).describe().compute;
  }

  std::optional<ContextHandle> context_;
  LoadOptions options_;

 private:
  bool on_cpu() const { return context_->device().kind == DeviceKind::kCpu; }
};

INSTANTIATE_TEST_SUITE_P(
    Backends, ConformanceTest, ::testing::ValuesIn(targets()), [](const auto& test) {
      std::string name = test.param.backend + "_" + test.param.device + "_" + test.param.kernel;
      std::replace_if(
          name.begin(), name.end(), [](unsigned char c) { return std::isalnum(c) == 0; }, '_');
      return name;
    });

TEST_P(ConformanceTest, DescribesItself) {
  const Layer layer = make_layer({.k = 64, .n = 40, .group_size = 32});
  const LinearHandle linear = load(layer.tensors(), layer.spec());
  const Description d = linear.describe();
  EXPECT_EQ(context().backend(), GetParam().backend);
  EXPECT_EQ(linear.backend(), GetParam().backend);
  EXPECT_EQ(d.backend, GetParam().backend);
  EXPECT_EQ(d.device, GetParam().device);
  EXPECT_EQ(d.kernel, GetParam().kernel);
  EXPECT_FALSE(d.arch.empty());
  EXPECT_FALSE(d.compute.empty());
  EXPECT_FALSE(d.schedule.empty());
  EXPECT_EQ(d.k, 64);
  EXPECT_EQ(d.n, 40);
  EXPECT_GE(d.k_padded, 64);
  EXPECT_GE(d.n_padded, 40);
  EXPECT_GT(d.packed_bytes, 0);
  EXPECT_TRUE(d.warnings.empty());
}

TEST_P(ConformanceTest, LinearOfEveryFormat) {
  std::uint64_t seed = 0;
  for (const int bits : {2, 3, 4, 8}) {
    for (const Zeros zeros : {Zeros::kAbsent, Zeros::kSymmetricV1, Zeros::kSymmetricV2,
                              Zeros::kAsymmetricV1, Zeros::kAsymmetricV2}) {
      for (const Order order : {Order::kNone, Order::kActOrder}) {
        for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
          const Layer layer = make_layer({.bits = bits,
                                          .k = 150,
                                          .n = 47,
                                          .group_size = 32,
                                          .zeros = zeros,
                                          .order = order,
                                          .scales = dtype,
                                          .bias = dtype,
                                          .seed = ++seed});
          SCOPED_TRACE(describe(layer.options));
          const LinearHandle linear = load(layer.tensors(), layer.spec());
          const Matrix x = test::random_matrix(19, 150, dtype, ++seed, 2);
          const test::Product expected = test::multiply(computed_with(x), 19, layer.dense());
          for (const std::int64_t m : {0, 1, 2, 19}) {
            Matrix out(19, 47, seed % 4 == 0 ? DType::kFloat32 : dtype, 1);
            test::forward(linear, context(), x, out, m);
            ASSERT_TRUE(matches(out, expected, m, dtype)) << "m " << m;
          }
        }
      }
    }
  }
}

TEST_P(ConformanceTest, FusedLinear) {
  std::vector<Layer> parts;
  for (const std::int64_t n : {64, 16, 31}) {
    parts.push_back(make_layer({.k = 96,
                                .n = n,
                                .group_size = 32,
                                .zeros = Zeros::kAsymmetricV1,
                                .order = Order::kActOrder,
                                .bias = DType::kFloat16,
                                .seed = static_cast<std::uint64_t>(n)}));
  }
  const LinearHandle linear = load(test::fused(parts), parts[0].spec());
  EXPECT_EQ(linear.out_features(), 111);
  EXPECT_EQ(linear.describe().fused, (std::vector<std::int64_t>{64, 16, 31}));
  const Matrix x = test::random_matrix(20, 96, DType::kFloat16, 3);
  Matrix out(20, 111, DType::kFloat32);
  test::forward(linear, context(), x, out, 20);
  EXPECT_TRUE(
      matches(out, test::multiply(computed_with(x), 20, test::fused_dense(parts)), 20, x.dtype()));
}

TEST_P(ConformanceTest, MislabelledFilesAreReadAsTheyAre) {
  for (const Zeros zeros : {Zeros::kSymmetricV1, Zeros::kSymmetricV2}) {
    const Layer layer = make_layer({.k = 64, .n = 32, .group_size = 32, .zeros = zeros});
    GptqSpec spec = layer.spec();
    spec.labelled = zeros == Zeros::kSymmetricV1 ? ZeroPoints::kV2 : ZeroPoints::kV1;
    const LinearHandle linear = load(layer.tensors(), spec);
    EXPECT_EQ(linear.describe().zero_points, zeros == Zeros::kSymmetricV1 ? "v1" : "v2");
    const Matrix x = test::random_matrix(16, 64, DType::kFloat32, 3);
    Matrix out(16, 32, DType::kFloat32);
    test::forward(linear, context(), x, out, 16);
    EXPECT_TRUE(matches(out, test::multiply(computed_with(x), 16, layer.dense()), 16, x.dtype()));
  }
}

TEST_P(ConformanceTest, WarningsReachTheUser) {
  Layer layer = make_layer(
      {.k = 64, .n = 32, .group_size = 32, .zeros = Zeros::kAsymmetricV1, .name = "old"});
  std::fill(layer.qzeros.begin(), layer.qzeros.end(), 0x33333333U);
  layer.qzeros[2] = 0xFFFFFF33U;
  const LinearHandle linear = load(layer.tensors(), layer.spec());
  ASSERT_EQ(linear.describe().warnings.size(), 1U);
  EXPECT_NE(linear.describe().warnings[0].find("old.qzeros"), std::string::npos);
}

TEST_P(ConformanceTest, ResultsRepeatBitForBit) {
  const Layer layer = make_layer({.k = 300, .n = 130, .zeros = Zeros::kAsymmetricV1});
  options_.batch_invariance = BatchInvariance::kRequired;
  const LinearHandle linear = load(layer.tensors(), layer.spec());
  EXPECT_TRUE(linear.describe().batch_invariant);
  const Matrix x = test::random_matrix(40, 300, DType::kFloat16, 3);
  Matrix first(40, 130, DType::kFloat16);
  test::forward(linear, context(), x, first, 40);
  const ContextHandle other = open_context(context().device(), {.threads = 3});
  for (const ContextHandle& with : {context(), other}) {
    for (const std::int64_t m : {1, 5, 40}) {
      Matrix out(40, 130, DType::kFloat16);
      test::forward(linear, with, x, out, m);
      EXPECT_EQ(out.row_bytes(0, m), first.row_bytes(0, m)) << "m " << m;
    }
  }
}

TEST_P(ConformanceTest, ScratchGrowsOnceForASize) {
  const Layer layer = make_layer({.k = 300, .n = 130, .order = Order::kActOrder});
  const LinearHandle linear = load(layer.tensors(), layer.spec());
  const Matrix x = test::random_matrix(40, 300, DType::kFloat32, 3);
  Matrix out(40, 130, DType::kFloat32);
  test::forward(linear, context(), x, out, 40);
  const std::int64_t grown = context().scratch_allocations();
  for (const std::int64_t m : {40, 1, 39, 40}) test::forward(linear, context(), x, out, m);
  EXPECT_EQ(context().scratch_allocations(), grown);
}

TEST_P(ConformanceTest, StackPhases) {
  const Experts experts = test::make_experts(5, 2,
                                             {.k = 96,
                                              .n = 24,
                                              .group_size = 32,
                                              .zeros = Zeros::kAsymmetricV1,
                                              .order = Order::kActOrder,
                                              .bias = DType::kBFloat16});
  if (lacks("load_gptq_stacked")) {
    expect_lacking("load_gptq_stacked", [&] { load(experts); });
    GTEST_SKIP() << GetParam().backend << " refuses expert stacks, as it should: it has none yet";
  }
  const std::vector<Dense> dense = experts.dense();
  const ExpertStackHandle stack = load(experts);
  EXPECT_EQ(stack.num_experts(), 5);
  EXPECT_EQ(stack.n_per_expert(), 48);
  const Matrix x = test::random_matrix(30, 96, DType::kFloat16, 5);
  const DeviceMatrix input(context(), x);
  const std::vector<double> values = x.values();

  for (std::int64_t e = 0; e < 5; ++e) {
    Matrix out(30, 48, DType::kFloat32, 1);
    test::forward(stack.expert(e), context(), x, out, 30);
    EXPECT_TRUE(
        matches(out, test::multiply(values, 30, dense[static_cast<std::size_t>(e)]), 30, x.dtype()))
        << "expert " << e;
  }

  // Rows 10 e to 10 e + 9 through expert 4 - 2 e, in falling order.
  const std::vector<ExpertDispatch> dispatches = {
      {.expert = 0, .input_row = 20, .output_row = 20, .rows = 10},
      {.expert = 2, .input_row = 10, .output_row = 10, .rows = 10},
      {.expert = 4, .input_row = 0, .output_row = 0, .rows = 10}};
  Matrix batched(31, 48, DType::kFloat32, 1);
  test::with_output(context(), batched, [&](const MatrixView& out) {
    stack.gemm_phase_batched(context(), input.input(), dispatches, out);
    stack.gemm_phase_batched(context(), input.input(), {}, out);
  });
  Matrix ids(30, 1, DType::kInt32);
  test::Product expected{.m = 30, .n = 48, .y = {}, .energy = {}};
  for (std::int64_t row = 0; row < 30; ++row) {
    const std::int64_t expert = 4 - 2 * (row / 10);
    ids.set(row, 0, static_cast<double>(expert));
    const test::Product one =
        test::multiply({values.begin() + row * 96, values.begin() + (row + 1) * 96}, 1,
                       dense[static_cast<std::size_t>(expert)]);
    expected.y.insert(expected.y.end(), one.y.begin(), one.y.end());
    expected.energy.push_back(one.energy[0]);
  }
  EXPECT_TRUE(matches(batched, expected, 30, x.dtype()));

  for (const int block_size : {8, 16, 32, 48, 64}) {
    const test::DeviceTiles tiles(context(), moe_align_block_size(ids.input(), block_size, 5));
    Matrix fused(30, 48, DType::kFloat32, 1);
    test::with_output(context(), fused, [&](const MatrixView& out) {
      stack.gemm_phase_fused(context(), input.input(), tiles.view(block_size, 1, 30), out);
    });
    EXPECT_TRUE(matches(fused, expected, 30, x.dtype())) << "block size " << block_size;
  }

  // Two ids a token, one of which is not here: a row of zeros.
  Matrix pairs(15, 2, DType::kInt32);
  test::Product both{.m = 30, .n = 48, .y = {}, .energy = {}};
  for (std::int64_t id = 0; id < 30; ++id) {
    const bool here = id % 3 != 0;
    pairs.set(id / 2, id % 2, here ? 3.0 : -1.0);
    const auto row = values.begin() + id / 2 * 96;
    const test::Product one = test::multiply({row, row + 96}, 1, dense[3]);
    for (const double y : one.y) both.y.push_back(here ? y : 0.0);
    both.energy.push_back(here ? one.energy[0] : 0.0);
  }
  const test::DeviceTiles tiles(context(), moe_align_block_size(pairs.input(), 16, 5));
  Matrix fused(30, 48, DType::kFloat32, 1);
  test::with_output(context(), fused, [&](const MatrixView& out) {
    stack.gemm_phase_fused(context(), input.input(), tiles.view(16, 2, 15), out);
  });
  EXPECT_TRUE(matches(fused, both, 30, x.dtype()));
}

TEST_P(ConformanceTest, Routing) {
  const Matrix logits = test::random_matrix(150, 6, DType::kFloat16, 9);
  Matrix ids(150, 2, DType::kInt32, 1);
  Matrix weights(150, 2, DType::kFloat32, 2);
  const auto route = [&] {
    const DeviceMatrix in(context(), logits);
    const DeviceMatrix chosen(context(), ids);
    const DeviceMatrix shares(context(), weights);
    context().route(in.input(), {.top_k = 2}, chosen.view(), shares.view());
    chosen.fetch(ids);
    shares.fetch(weights);
  };
  if (lacks("route")) {
    expect_lacking("route", route);
    GTEST_SKIP() << GetParam().backend << " refuses routing, as it should: it has none yet";
  }
  route();
  EXPECT_TRUE(ids.guards_intact());
  EXPECT_TRUE(weights.guards_intact());
  Matrix host_ids(150, 2, DType::kInt32);
  Matrix host_weights(150, 2, DType::kFloat32);
  marlinq::route(logits.input(), {.top_k = 2}, host_ids.view(), host_weights.view());
  EXPECT_EQ(ids.values(), host_ids.values());
  EXPECT_TRUE(test::within(weights.values(), host_weights.values(), 0, 2,
                           test::tolerances::kRoutingCudaWeights));
}

TEST_P(ConformanceTest, MoeBlock) {
  const Experts gate_up = test::make_experts(
      6, 2, {.k = 64, .n = 48, .group_size = 32, .order = Order::kActOrder, .seed = 1});
  const Experts down = test::make_experts(6, 1, {.k = 48, .n = 64, .group_size = 16, .seed = 90});
  if (lacks("load_gptq_stacked")) {
    expect_lacking("load_gptq_stacked", [&] { load(gate_up); });
    GTEST_SKIP() << GetParam().backend << " refuses expert stacks, as it should: it has none yet";
  }
  test::MoeReference reference;
  reference.gate_up = gate_up.dense();
  reference.down = down.dense();
  const Layer shared_up = make_layer({.k = 64, .n = 2 * 40, .group_size = 32, .seed = 200});
  const Layer shared_down = make_layer({.k = 40, .n = 64, .group_size = 8, .seed = 201});
  const Matrix x = test::random_matrix(25, 64, DType::kFloat16, 8, 8);
  test::Random random(9);
  const Matrix ids = test::random_topk_ids(25, 2, 6, DType::kInt64, 20, random, 1);
  const Matrix weights = test::random_topk_weights(25, 2, random, 1);
  const Matrix residual = test::random_matrix(25, 64, DType::kFloat32, 10);
  const DeviceMatrix there_x(context(), x);
  const DeviceMatrix there_ids(context(), ids);
  const DeviceMatrix there_weights(context(), weights);
  const DeviceMatrix there_residual(context(), residual);
  const MoeInput plain{.x = there_x.input(),
                       .topk_ids = there_ids.input(),
                       .topk_weights = there_weights.input(),
                       .shared_output = std::nullopt,
                       .residual = std::nullopt};
  const ExpertStackHandle up = load(gate_up);
  const ExpertStackHandle back = load(down);
  const auto check = [&](const MoeBlockSpec& spec, const MoeInput& input,
                         std::vector<double> expected) {
    if (input.residual) {
      const std::vector<double> added = residual.values();
      for (std::size_t i = 0; i < expected.size(); ++i) expected[i] += added[i];
    }
    const MoeBlockHandle block = context().make_moe_block(spec);
    Matrix out(25, 64, DType::kFloat32, 3);
    test::with_output(context(), out,
                      [&](const MatrixView& to) { block.forward(context(), input, to); });
    EXPECT_TRUE(out.guards_intact());
    EXPECT_TRUE(test::within(out.values(), expected, 0, 64, block_bound()))
        << to_string(spec.activation);
  };
  MoeInput with_residual = plain;
  with_residual.residual = there_residual.input();
  for (const Activation activation :
       {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kClampedSwiglu}) {
    for (const RouterWeight where : {RouterWeight::kOnOutput, RouterWeight::kOnInput}) {
      reference.activation = activation;
      reference.router_weight = where;
      check({.gate_up = up, .down = back, .activation = activation, .router_weight = where}, plain,
            reference.forward(x, ids, weights));
    }
  }
  reference.shared = {shared_up.dense(), shared_down.dense()};
  reference.shared_gate.assign(64, 0.125F);
  check({.gate_up = up,
         .down = back,
         .activation = reference.activation,
         .router_weight = reference.router_weight,
         .shared_gate_up = load(shared_up.tensors(), shared_up.spec()),
         .shared_down = load(shared_down.tensors(), shared_down.spec()),
         .shared_gate = reference.shared_gate},
        with_residual, reference.forward(x, ids, weights));
}

TEST_P(ConformanceTest, RefusesAtLoad) {
  const Layer layer = make_layer({.k = 64, .n = 32, .group_size = 32, .name = "mlp.down_proj"});
  GptqModule bad = layer.module();
  bad.scales.shape[0] = 3;
  expect_refused({"mlp.down_proj.scales", "shape [3, 32]", "[2, 32]"},
                 [&] { load(bad, layer.spec()); });
  expect_refused({"bits: 5"}, [&] { load(layer.tensors(), {.bits = 5}); });
  options_.kernel = "no such kernel";
  expect_refused({"kernel: 'no such kernel'", GetParam().kernel},
                 [&] { load(layer.tensors(), layer.spec()); });
}

TEST_P(ConformanceTest, RefusesComputeTypesThatItDoesNotList) {
  const Layer layer = make_layer({.k = 64, .n = 32});
  for (const BackendInfo& info : backends()) {
    if (info.name != GetParam().backend) continue;
    for (const Compute compute :
         {Compute::kFloat32, Compute::kInt16, Compute::kBFloat16, Compute::kInt8}) {
      options_.compute = compute;
      const std::string name(to_string(compute));
      if (std::find(info.compute.begin(), info.compute.end(), name) != info.compute.end()) {
        EXPECT_EQ(load(layer.tensors(), layer.spec()).describe().compute, name);
      } else {
        expect_error(ErrorCode::kUnsupported, {info.name, name},
                     [&] { load(layer.tensors(), layer.spec()); });
      }
    }
  }
}

TEST_P(ConformanceTest, RefusesViewsThatDoNotFit) {
  const Layer layer = make_layer({.k = 64, .n = 32});
  const LinearHandle linear = load(layer.tensors(), layer.spec());
  const Matrix x = test::random_matrix(4, 64, DType::kFloat32, 1);
  Matrix out(4, 32, DType::kFloat32);
  const DeviceMatrix there(context(), x);
  const DeviceMatrix there_out(context(), out);
  ConstMatrixView narrow = there.input();
  narrow.cols = 60;
  expect_refused({"x: 60 columns", "expected 64"},
                 [&] { linear.forward(context(), narrow, there_out.view(), 4); });
  expect_refused({"x: 4 rows", "at least 5"},
                 [&] { linear.forward(context(), there.input(), there_out.view(), 5); });
  ConstMatrixView elsewhere = there.input();
  elsewhere.device = {DeviceKind::kCuda, 7};
  expect_refused({"x: on cuda:7", "expected " + GetParam().device},
                 [&] { linear.forward(context(), elsewhere, there_out.view(), 4); });
  if (!lacks("load_gptq_stacked")) {
    expect_refused({"expert: 9"},
                   [&] { load(test::make_experts(2, 1, {.k = 64, .n = 32})).expert(9); });
  }
  there_out.fetch(out);
  EXPECT_TRUE(out.guards_intact(0));
  test::forward(linear, context(), x, out, 4);
  EXPECT_TRUE(matches(out, test::multiply(computed_with(x), 4, layer.dense()), 4, x.dtype()));
}

}  // namespace
}  // namespace marlinq
