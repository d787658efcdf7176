// Loading when calls of the runtime fail, and the order of work that a real device would hide. On the
// fake device only.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cuda/arch/sm80/load.hpp"
#include "cuda/device_memory.hpp"
#include "cuda/fake_device.hpp"
#include "cuda/packed_layer.hpp"
#include "cuda/upload.hpp"
#include "support/compare.hpp"

namespace marlinq {
namespace {

using cuda::Completion;
using cuda::DeviceWeight;
using cuda::LayersToLoad;
using cuda::LayerUpload;
using cuda::OwnedStream;
using cuda::RelaxedCapture;
using cuda::Uploader;
using cuda::UploadSizes;
using test::DeviceMemory;
using test::FakeDevice;
using test::make_layer;
using test::PackCase;
using Bytes = std::vector<unsigned char>;

class FakeDeviceTest : public ::testing::Test {
 protected:
  ~FakeDeviceTest() override {
    FakeDevice::fail_call(0, cudaSuccess);
    EXPECT_EQ(FakeDevice::buffers(), 0);
    EXPECT_EQ(DeviceMemory::pinned_bytes(), 0);
    EXPECT_EQ(FakeDevice::events(), 0);
    EXPECT_EQ(FakeDevice::streams(), 0);
    EXPECT_EQ(FakeDevice::violations(), "");
  }

  static UploadSizes sizes() {
    return {.least_piece = 2048, .most_piece = 4096, .ring = {.slot_bytes = 512, .threads = 3}};
  }

  static DeviceWeight load(Uploader& uploader, const PackCase& one) {
    const GptqTensors tensors = one.tensors();
    const GptqSpec spec = one.spec();
    LayersToLoad layers({&tensors, 1}, spec);
    LayerUpload upload(uploader, layers);
    return cuda::sm80::load(layers, upload);
  }

  static Bytes bytes_of(const DeviceWeight& weight) {
    weight.ready.wait();
    const auto* begin = static_cast<const unsigned char*>(weight.memory.data());
    return {begin, begin + weight.memory.size() * 4};
  }

  // Of several pieces, two segments, with an order of its own.
  const PackCase case_ = {.what = "",
                          .parts = {make_layer({.k = 320,
                                                .n = 90,
                                                .group_size = 32,
                                                .zeros = test::Zeros::kAsymmetricV1,
                                                .bias = DType::kFloat16}),
                                    make_layer({.k = 320,
                                                .n = 70,
                                                .group_size = 32,
                                                .zeros = test::Zeros::kAsymmetricV1,
                                                .order = test::Order::kActOrder,
                                                .seed = 2})}};
  const Bytes expected_ = test::packed_by_definition(case_.parts);
};

// Each call in turn: a load fails as a whole, what it held is given back, and the next one works.
TEST_F(FakeDeviceTest, AnyCallMayFail) {
  for (const cudaError_t error : {cudaErrorUnknown, cudaErrorMemoryAllocation}) {
    bool reached = true;
    int refused = 0;
    for (int n = 1; reached; ++n) {
      FakeDevice::fail_call(n, error);
      try {
        Uploader uploader(0, sizes());
        try {
          const Bytes bytes = bytes_of(load(uploader, case_));
          EXPECT_TRUE(bytes == expected_) << n;
        } catch (const Error& e) {
          ++refused;
          EXPECT_EQ(e.code(),
                    error == cudaErrorUnknown ? ErrorCode::kDevice : ErrorCode::kOutOfMemory)
              << n << ": " << e.what();
        }
        reached = FakeDevice::has_failed();
        FakeDevice::fail_call(0, cudaSuccess);
        ASSERT_TRUE(bytes_of(load(uploader, case_)) == expected_) << n;
      } catch (const Error&) {  // not even an uploader
        ++refused;
      }
      FakeDevice::fail_call(0, cudaSuccess);
      ASSERT_EQ(FakeDevice::buffers(), 0) << n;
      ASSERT_EQ(FakeDevice::events(), 0) << n;
      ASSERT_EQ(FakeDevice::streams(), 0) << n;
      ASSERT_EQ(DeviceMemory::pinned_bytes(), 0) << n;
    }
    EXPECT_GT(refused, 50);
  }
}

TEST_F(FakeDeviceTest, OutOfMemorySaysHowMuch) {
  Uploader uploader(0, sizes());
  FakeDevice::limit(40000);
  test::expect_error(ErrorCode::kOutOfMemory,
                     {"cannot allocate " + std::to_string(expected_.size()) + " bytes on cuda:0"},
                     [&] { load(uploader, case_); });
  FakeDevice::limit(0);
  EXPECT_TRUE(bytes_of(load(uploader, case_)) == expected_);
}

TEST_F(FakeDeviceTest, NothingIsHeldBeforeTheFirstLoad) {
  const Uploader uploader(0);
  EXPECT_EQ(FakeDevice::buffers(), 0);
  EXPECT_EQ(DeviceMemory::pinned_bytes(), 0);
}

// A load returns while the packing waits on the device; whoever uses the weight is ordered after it.
TEST_F(FakeDeviceTest, UsersWaitForThePacking) {
  const PackCase small{.what = "", .parts = {make_layer({.k = 64, .n = 40})}};
  const Bytes expected = test::packed_by_definition(small.parts);
  Uploader uploader(0);
  const OwnedStream user;
  (void)bytes_of(load(uploader, small));
  FakeDevice::hold(true);
  const DeviceWeight weight = load(uploader, small);
  weight.ready.precede(user.get());
  Bytes seen;
  FakeDevice::enqueue(user.get(), [&] {
    const auto* begin = static_cast<const unsigned char*>(weight.memory.data());
    seen.assign(begin, begin + weight.memory.size() * 4);
  });
  FakeDevice::hold(false);
  const RelaxedCapture relaxed;
  (void)cudaStreamSynchronize(user.get());
  EXPECT_TRUE(seen == expected);
  // From now on it costs no call.
  weight.ready.precede(user.get());
  const int calls = FakeDevice::calls();
  weight.ready.precede(user.get());
  weight.ready.wait();
  EXPECT_EQ(FakeDevice::calls(), calls);
}

TEST_F(FakeDeviceTest, ACaptureDependsOnNothingOutside) {
  Uploader uploader(0, sizes());
  const OwnedStream user;
  for (int round = 0; round < 20; ++round) {
    const DeviceWeight weight = load(uploader, case_);
    FakeDevice::set_capturing(user.get(), true);
    weight.ready.precede(user.get());
    const auto* begin = static_cast<const unsigned char*>(weight.memory.data());
    EXPECT_TRUE(Bytes(begin, begin + weight.memory.size() * 4) == expected_);
    FakeDevice::set_capturing(user.get(), false);
  }
}

TEST_F(FakeDeviceTest, AWeightThatGoesAtOnceIsWaitedFor) {
  Uploader uploader(0, sizes());
  for (int round = 0; round < 50; ++round) (void)load(uploader, case_);
}

}  // namespace
}  // namespace marlinq
