// Contexts: threads, scratch that is counted and only grows, and memory that runs out.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <limits>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "cpu/context.hpp"
#include "cpu/parallel.hpp"
#include "support/compare.hpp"
#include "support/moe_reference.hpp"

namespace marlinq {
namespace {

using cpu::CpuBuffer;
using cpu::CpuContext;
using test::expect_error;
using test::expect_refused;
using test::Layer;
using test::LayerOptions;
using test::make_layer;
using test::Matrix;
using test::Order;
using test::Zeros;

TEST(ContextTest, Threads) {
  EXPECT_EQ(CpuContext(3).threads(), 3);
  EXPECT_EQ(CpuContext(0).threads(), cpu::default_threads());
  EXPECT_GE(cpu::default_threads(), 1);
  const int most = cpu::max_threads();
  EXPECT_EQ(CpuContext(most).threads(), most);
  for (const int threads : {-1, most + 1, std::numeric_limits<int>::max()}) {
    expect_refused({"threads: " + std::to_string(threads), "0 (all) to " + std::to_string(most)},
                   [&] { CpuContext context(threads); });
  }
}

TEST(ParallelTest, EveryPartAndEveryIndexOnce) {
  for (const int threads : {1, 2, 3, 8, 33}) {
    for (const std::int64_t count : {0, 1, 2, 7, 100}) {
      for (const std::int64_t grain : {0, 1, 10, 1000}) {
        std::vector<std::atomic<int>> seen(static_cast<std::size_t>(count));
        cpu::parallel_for(threads, count, grain, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t i = begin; i < end; ++i) ++seen[static_cast<std::size_t>(i)];
        });
        for (const auto& times : seen) ASSERT_EQ(times, 1);
      }
    }
    std::vector<std::atomic<int>> parts(static_cast<std::size_t>(threads));
    cpu::parallel_parts(threads, [&](int part, int all) {
      EXPECT_EQ(all, threads);
      ++parts[static_cast<std::size_t>(part)];
    });
    for (const auto& times : parts) EXPECT_EQ(times, 1);
  }
}

TEST(BufferTest, OwnsAlignedMemory) {
  CpuBuffer buffer(DType::kFloat16, 1000);
  EXPECT_EQ(buffer.size(), 1000);
  EXPECT_EQ(buffer.dtype(), DType::kFloat16);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer.data()) % CpuBuffer::kAlignment, 0U);
  const void* data = buffer.data();
  CpuBuffer moved(std::move(buffer));
  EXPECT_EQ(moved.data(), data);
  buffer = std::move(moved);  // NOLINT: a moved-from buffer may be assigned to
  EXPECT_EQ(buffer.data(), data);
  EXPECT_EQ(CpuBuffer(DType::kFloat32, 0).data(), nullptr);
  const CpuBuffer large(DType::kInt64, 1 << 20);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(large.data()) % CpuBuffer::kAlignment, 0U);
}

TEST(BufferTest, OutOfMemoryIsAnError) {
  for (const std::int64_t size :
       {std::int64_t{1} << 58, std::numeric_limits<std::int64_t>::max(), std::int64_t{-1}}) {
    expect_error(ErrorCode::kOutOfMemory, {"cannot allocate"},
                 [&] { CpuBuffer buffer(DType::kInt64, size); });
  }
}

// --- scratch ---

class ScratchTest : public ::testing::Test {
 protected:
  static void forward(CpuContext& context, const Linear<CpuBackend>& linear, std::int64_t m,
                      DType dtype) {
    const Matrix x = test::random_matrix(m, linear.in_features(), dtype, 1);
    Matrix out(m, linear.out_features(), dtype);
    linear.forward(context, x.input(), out.view(), m);
  }
};

TEST_F(ScratchTest, ARepeatedOrSmallerSizeNeverAllocates) {
  const Layer layer = make_layer({.k = 200,
                                  .n = 100,
                                  .group_size = 32,
                                  .zeros = Zeros::kAsymmetricV1,
                                  .order = Order::kActOrder});
  CpuContext context(3);
  const auto linear = CpuBackend::load_gptq(context, layer.tensors(), layer.spec());
  for (const std::int64_t m : {1, 7, 64, 257}) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      forward(context, *linear, m, dtype);
      const std::int64_t grown = context.scratch_allocations();
      for (const std::int64_t smaller : {m, m / 2, std::int64_t{1}, m}) {
        forward(context, *linear, smaller, dtype);
        EXPECT_EQ(context.scratch_allocations(), grown) << "m " << smaller << " after " << m;
      }
    }
  }
  EXPECT_GT(context.scratch_allocations(), 0);
}

struct PregrowCase {
  const char* name;
  LayerOptions options;
  int parts;
  DType dtype;

  friend std::ostream& operator<<(std::ostream& out, const PregrowCase& c) {
    return out << describe(c.options) << ", " << c.parts << " parts, x " << to_string(c.dtype);
  }
};

class PregrowTest : public ScratchTest, public ::testing::WithParamInterface<PregrowCase> {};

constexpr std::array kComputes = {Compute::kFloat32, Compute::kInt16, Compute::kBFloat16,
                                  Compute::kInt8};

TEST_P(PregrowTest, TheFirstForwardDoesNotAllocate) {
  const PregrowCase& c = GetParam();
  std::vector<Layer> parts;
  for (int part = 0; part < c.parts; ++part) {
    LayerOptions options = c.options;
    options.seed += static_cast<std::uint64_t>(part);
    parts.push_back(make_layer(options));
  }
  for (const Compute compute : kComputes) {
    for (const std::int64_t m : {1, 17, 130}) {
      CpuContext context(2);
      const auto linear = CpuBackend::load_gptq(context, test::fused(parts), parts.front().spec(),
                                                {.compute = compute});
      CpuBackend::pregrow_marlin_gather_scratch(context, m * linear->in_features());
      const std::int64_t grown = context.scratch_allocations();
      EXPECT_GT(grown, 0);
      forward(context, *linear, m, c.dtype);
      EXPECT_EQ(context.scratch_allocations(), grown) << to_string(compute) << ", m " << m;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Layers, PregrowTest,
    ::testing::Values(
        PregrowCase{"plain", {.k = 256, .n = 96}, 1, DType::kFloat32},
        PregrowCase{"float16", {.k = 256, .n = 96}, 1, DType::kFloat16},
        PregrowCase{
            "asymmetric", {.k = 256, .n = 96, .zeros = Zeros::kAsymmetricV1}, 1, DType::kFloat32},
        PregrowCase{"odd_k", {.k = 60, .n = 96, .group_size = 7}, 1, DType::kFloat32},
        PregrowCase{
            "act_order", {.k = 256, .n = 96, .order = Order::kActOrder}, 1, DType::kFloat32},
        PregrowCase{"fused_act_order",
                    {.k = 256, .n = 96, .group_size = 32, .order = Order::kActOrder},
                    3,
                    DType::kFloat32}),
    [](const auto& test) { return std::string(test.param.name); });

TEST_F(ScratchTest, PregrowIsIdempotentAndOnlyGrows) {
  CpuContext context(2);
  CpuBackend::pregrow_marlin_gather_scratch(context, 0);
  EXPECT_EQ(context.scratch_allocations(), 0);
  CpuBackend::pregrow_marlin_gather_scratch(context, 1000);
  const std::int64_t grown = context.scratch_allocations();
  EXPECT_GT(grown, 0);
  CpuBackend::pregrow_marlin_gather_scratch(context, 1000);
  CpuBackend::pregrow_marlin_gather_scratch(context, 10);
  EXPECT_EQ(context.scratch_allocations(), grown);
  CpuBackend::pregrow_marlin_gather_scratch(context, 100000);
  EXPECT_GT(context.scratch_allocations(), grown);
}

TEST_F(ScratchTest, PregrowRefusesNegativeSizes) {
  CpuContext context(2);
  expect_refused({"required_elements: -1", "at least 0"},
                 [&] { CpuBackend::pregrow_marlin_gather_scratch(context, -1); });
}

TEST_F(ScratchTest, ContextAndWeightsSurviveOutOfMemory) {
  const Layer layer = make_layer({.k = 64, .n = 32});
  CpuContext context(2);
  const auto linear =
      CpuBackend::load_gptq(context, layer.tensors(), layer.spec(), {.compute = Compute::kFloat32});
  const Matrix x = test::random_matrix(9, 64, DType::kFloat32, 1);
  for (const std::int64_t elements :
       {std::int64_t{1} << 58, std::numeric_limits<std::int64_t>::max()}) {
    expect_error(ErrorCode::kOutOfMemory, {"cannot allocate"},
                 [&] { CpuBackend::pregrow_marlin_gather_scratch(context, elements); });
    Matrix out(9, 32, DType::kFloat32);
    linear->forward(context, x.input(), out.view(), 9);
    EXPECT_TRUE(test::matches(out, test::multiply(x.values(), 9, layer.dense()), 9));
  }
}

TEST_F(ScratchTest, ARepeatedMoeBlockNeverAllocates) {
  const test::Experts gate_up =
      test::make_experts(4, 2, {.k = 64, .n = 32, .group_size = 32, .order = Order::kActOrder});
  const test::Experts down = test::make_experts(4, 1, {.k = 32, .n = 64, .group_size = 32});
  CpuContext context(2);
  const auto block = CpuBackend::make_moe_block(
      context,
      {.gate_up = CpuBackend::load_gptq_stacked(context, gate_up.tensors(), gate_up.spec()),
       .down = CpuBackend::load_gptq_stacked(context, down.tensors(), down.spec()),
       .router_weight = RouterWeight::kOnInput});
  test::Random random(1);
  const Matrix x = test::random_matrix(33, 64, DType::kFloat16, 2);
  const Matrix ids = test::random_topk_ids(33, 2, 4, DType::kInt32, 0, random);
  const Matrix weights = test::random_topk_weights(33, 2, random);
  Matrix out(33, 64, DType::kFloat16);
  const MoeInput input{.x = x.input(), .topk_ids = ids.input(), .topk_weights = weights.input()};
  block->forward(context, input, out.view());
  const std::int64_t grown = context.scratch_allocations();
  for (int i = 0; i < 3; ++i) block->forward(context, input, out.view());
  EXPECT_EQ(context.scratch_allocations(), grown);
}

}  // namespace
}  // namespace marlinq
