// Arrays in host memory for a backend whose memory is elsewhere, and the memory functions of a
// context: through a backend whose "device" is host memory that it watches.
#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "marlinq/handle.hpp"
#include "marlinq/registry.hpp"
#include "runtime/erased.hpp"
#include "support/compare.hpp"
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

class HostStagingTest : public ::testing::Test {
 protected:
  HostStagingTest()
      : model(std::make_shared<detail::ContextModel<FarBackend>>(FarContext{})),
        context(model),
        linear(std::make_shared<detail::LinearModel<FarBackend>>(std::make_shared<FarLinear>())) {}

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
