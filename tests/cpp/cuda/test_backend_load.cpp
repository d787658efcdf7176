// load_gptq of the CUDA backend on a real device: what is promised of a weight from the moment that a
// load returns, and after one that failed.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cuda/context.hpp"
#include "cuda/device_memory.hpp"
#include "marlinq/cuda/cuda_backend.hpp"
#include "support/compare.hpp"

namespace marlinq {
namespace {

using test::DeviceMemory;
using test::Layer;
using test::make_layer;
using test::Order;
using Bytes = std::vector<unsigned char>;

void check(cudaError_t status) { ASSERT_EQ(status, cudaSuccess) << cudaGetErrorString(status); }

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { check(cudaStreamDestroy(stream_)); }
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

// A matrix of float16 on the device.
class DeviceMatrix {
 public:
  DeviceMatrix(std::int64_t rows, std::int64_t cols)
      : rows_(rows), cols_(cols), buffer_(0, DType::kFloat16, rows * cols) {}
  explicit DeviceMatrix(const test::Matrix& from) : DeviceMatrix(from.rows(), from.cols()) {
    check(cudaMemcpy(buffer_.data(), from.data(), bytes(), cudaMemcpyHostToDevice));
  }

  std::size_t bytes() const { return static_cast<std::size_t>(rows_ * cols_) * 2; }
  ConstMatrixView input() const { return as_const(view()); }
  MatrixView view() const {
    return {buffer_.data(), DType::kFloat16, {DeviceKind::kCuda, 0}, rows_, cols_, cols_};
  }
  void clear() const { check(cudaMemset(buffer_.data(), 0xFF, bytes())); }
  Bytes read() const {
    Bytes result(bytes());
    check(cudaMemcpy(result.data(), buffer_.data(), bytes(), cudaMemcpyDeviceToHost));
    return result;
  }

 private:
  std::int64_t rows_;
  std::int64_t cols_;
  cuda::CudaBuffer buffer_;
};

class BackendLoadTest : public ::testing::Test {
 protected:
  static constexpr std::int64_t kFeatures = 2048;
  static constexpr std::int64_t kRows = 16;

  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "no CUDA device";
    check(cudaFree(nullptr));
  }

  static const Layer& layer() {
    static const Layer made = make_layer({.k = kFeatures,
                                          .n = kFeatures,
                                          .zeros = test::Zeros::kAsymmetricV1,
                                          .order = Order::kActOrder,
                                          .name = "model.layers.3.q_proj"});
    return made;
  }
  static const test::Matrix& x() {
    static const test::Matrix made = test::random_matrix(kRows, kFeatures, DType::kFloat16, 5);
    return made;
  }

  // A copy of the tensors goes with the call, so that nothing may look at them afterwards.
  static std::shared_ptr<Linear<CudaBackend>> load(CudaBackend::Context& context) {
    const auto copy = std::make_unique<Layer>(layer());
    std::shared_ptr<Linear<CudaBackend>> linear =
        CudaBackend::load_gptq(context, copy->tensors(), copy->spec());
    std::fill(copy->qweight.begin(), copy->qweight.end(), 0U);
    std::memset(copy->scales.data(), 0, copy->scales.size());
    return linear;
  }

  // What a forward gives that began long after its load.
  static Bytes settled(CudaBackend::Context& context, const Linear<CudaBackend>& linear,
                       const DeviceMatrix& input) {
    check(cudaDeviceSynchronize());
    const DeviceMatrix output(kRows, kFeatures);
    output.clear();
    linear.forward(context, input.input(), output.view(), kRows);
    check(cudaDeviceSynchronize());
    return output.read();
  }
};

TEST_F(BackendLoadTest, AForwardMayFollowAtOnceOnAnyStream) {
  const DeviceMatrix input(x());
  CudaBackend::Context loader(0);
  const Stream stream;
  CudaBackend::Context user(0, stream.get());
  CudaBackend::pregrow_marlin_gather_scratch(user, kRows * kFeatures);
  const DeviceMatrix output(kRows, kFeatures);
  for (int round = 0; round < 20; ++round) {
    output.clear();
    check(cudaDeviceSynchronize());
    const std::shared_ptr<Linear<CudaBackend>> linear = load(loader);
    linear->forward(user, input.input(), output.view(), kRows);
    check(cudaStreamSynchronize(stream.get()));
    ASSERT_TRUE(output.read() == settled(user, *linear, input)) << round;
  }
}

TEST_F(BackendLoadTest, ACaptureMayFollowAtOnce) {
  const DeviceMatrix input(x());
  CudaBackend::Context loader(0);
  const Stream stream;
  CudaBackend::Context user(0, stream.get());
  CudaBackend::pregrow_marlin_gather_scratch(user, kRows * kFeatures);
  (void)settled(user, *load(loader), input);  // brings the kernels in
  const DeviceMatrix output(kRows, kFeatures);
  for (int round = 0; round < 20; ++round) {
    output.clear();
    check(cudaDeviceSynchronize());
    const std::shared_ptr<Linear<CudaBackend>> linear = load(loader);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t runnable = nullptr;
    check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeGlobal));
    linear->forward(user, input.input(), output.view(), kRows);
    check(cudaStreamEndCapture(stream.get(), &graph));
    check(cudaGraphInstantiate(&runnable, graph, 0));
    check(cudaGraphLaunch(runnable, stream.get()));
    check(cudaStreamSynchronize(stream.get()));
    check(cudaGraphExecDestroy(runnable));
    check(cudaGraphDestroy(graph));
    ASSERT_TRUE(output.read() == settled(user, *linear, input)) << round;
  }
}

TEST_F(BackendLoadTest, LoadsWhileAnotherThreadCaptures) {
  const DeviceMatrix input(x());
  const Stream stream;
  CudaBackend::Context user(0, stream.get());
  CudaBackend::pregrow_marlin_gather_scratch(user, kRows * kFeatures);
  const std::shared_ptr<Linear<CudaBackend>> linear = load(user);
  const Bytes expected = settled(user, *linear, input);
  const DeviceMatrix output(kRows, kFeatures);
  CudaBackend::Context other(0);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t runnable = nullptr;
  check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeGlobal));
  std::string error;
  std::thread loader([&] {
    try {
      for (int round = 0; round < 3; ++round) (void)load(other);
    } catch (const Error& e) {
      error = e.what();
    }
  });
  linear->forward(user, input.input(), output.view(), kRows);
  loader.join();
  check(cudaStreamEndCapture(stream.get(), &graph));
  EXPECT_EQ(error, "");
  check(cudaGraphInstantiate(&runnable, graph, 0));
  check(cudaGraphLaunch(runnable, stream.get()));
  check(cudaStreamSynchronize(stream.get()));
  check(cudaGraphExecDestroy(runnable));
  check(cudaGraphDestroy(graph));
  EXPECT_TRUE(output.read() == expected);
}

TEST_F(BackendLoadTest, OutOfMemoryNamesTheLayerAndTheBytes) {
  const DeviceMatrix input(x());
  CudaBackend::Context context(0);
  const std::shared_ptr<Linear<CudaBackend>> before = load(context);
  const Bytes expected = settled(context, *before, input);
  const std::int64_t bytes = DeviceMemory::bytes();
  const std::string packed = std::to_string(before->describe().packed_bytes);
  DeviceMemory::fail_device_allocation(1);
  test::expect_error(ErrorCode::kOutOfMemory,
                     {"model.layers.3.q_proj: cannot allocate " + packed + " bytes on cuda:0"},
                     [&] { load(context); });
  DeviceMemory::fail_device_allocation(0);
  EXPECT_EQ(DeviceMemory::bytes(), bytes);
  EXPECT_TRUE(settled(context, *before, input) == expected);
  EXPECT_TRUE(settled(context, *load(context), input) == expected);
}

TEST_F(BackendLoadTest, ARefusedLayerLeavesTheContextUsable) {
  const DeviceMatrix input(x());
  CudaBackend::Context context(0);
  Layer bad = layer();
  test::write_element(bad.scales.data(), DType::kFloat16, 5, 1e6);
  test::expect_refused({"model.layers.3.q_proj.scales: element [0, 5] is inf"},
                       [&] { CudaBackend::load_gptq(context, bad.tensors(), bad.spec()); });
  const std::shared_ptr<Linear<CudaBackend>> linear = load(context);
  CudaBackend::Context other(0);
  EXPECT_TRUE(settled(context, *linear, input) == settled(other, *load(other), input));
}

TEST_F(BackendLoadTest, OnlyLoadsTakeMemoryForLoading) {
  const DeviceMatrix input(x());
  std::shared_ptr<Linear<CudaBackend>> linear;
  std::int64_t staging = 0;
  {
    CudaBackend::Context loader(0);
    const std::int64_t before = DeviceMemory::bytes();
    linear = load(loader);
    staging = DeviceMemory::bytes() - before - linear->describe().packed_bytes;
    EXPECT_GT(DeviceMemory::pinned_bytes(), 0);
  }
  EXPECT_GT(staging, 0);
  EXPECT_LE(staging, (std::int64_t{4} << 20) + (std::int64_t{256} << 10));
  EXPECT_EQ(DeviceMemory::pinned_bytes(), 0);
  CudaBackend::Context user(0);
  CudaBackend::pregrow_marlin_gather_scratch(user, kRows * kFeatures);
  const DeviceMatrix output(kRows, kFeatures);
  const std::int64_t before = DeviceMemory::bytes();
  for (int round = 0; round < 3; ++round) {
    linear->forward(user, input.input(), output.view(), kRows);
  }
  check(cudaDeviceSynchronize());
  EXPECT_EQ(DeviceMemory::bytes(), before);
  EXPECT_EQ(DeviceMemory::pinned_bytes(), 0);
}

}  // namespace
}  // namespace marlinq
