// Error, and the names that messages and users see.
#include <gtest/gtest.h>

#include <set>
#include <string>

#include "marlinq/error.hpp"
#include "marlinq/load_options.hpp"
#include "marlinq/moe_block.hpp"
#include "marlinq/routing.hpp"
#include "marlinq/types.hpp"
#include "support/compare.hpp"

namespace marlinq {
namespace {

using test::expect_refused;

TEST(ErrorTest, CarriesCodeMessageAndPlace) {
  try {
    throw Error(ErrorCode::kDevice, "the message");
  } catch (const std::runtime_error& caught) {
    const auto* error = dynamic_cast<const Error*>(&caught);
    ASSERT_NE(error, nullptr);
    EXPECT_EQ(error->code(), ErrorCode::kDevice);
    EXPECT_STREQ(error->what(), "the message");
    EXPECT_NE(std::string(error->where().file_name()).find("test_error.cpp"), std::string::npos);
  }
}

TEST(ErrorTest, CodesHaveTheirNames) {
  EXPECT_EQ(to_string(ErrorCode::kInvalidArgument), "invalid_argument");
  EXPECT_EQ(to_string(ErrorCode::kInvalidFile), "invalid_file");
  EXPECT_EQ(to_string(ErrorCode::kUnsupported), "unsupported");
  EXPECT_EQ(to_string(ErrorCode::kOutOfMemory), "out_of_memory");
  EXPECT_EQ(to_string(ErrorCode::kDevice), "device");
  EXPECT_EQ(to_string(ErrorCode::kInternal), "internal");
}

TEST(NamesTest, DTypes) {
  EXPECT_EQ(to_string(DType::kFloat32), "float32");
  EXPECT_EQ(to_string(DType::kFloat16), "float16");
  EXPECT_EQ(to_string(DType::kBFloat16), "bfloat16");
  EXPECT_EQ(to_string(DType::kInt32), "int32");
  EXPECT_EQ(to_string(DType::kInt64), "int64");
  EXPECT_EQ(size_of(DType::kFloat16), 2U);
  EXPECT_EQ(size_of(DType::kBFloat16), 2U);
  EXPECT_EQ(size_of(DType::kFloat32), 4U);
  EXPECT_EQ(size_of(DType::kInt32), 4U);
  EXPECT_EQ(size_of(DType::kInt64), 8U);
}

TEST(NamesTest, ParsersUndoTheNames) {
  for (const Compute c :
       {Compute::kAuto, Compute::kFloat32, Compute::kInt16, Compute::kBFloat16, Compute::kInt8}) {
    EXPECT_EQ(parse_compute(to_string(c)), c);
  }
  for (const Activation a :
       {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kClampedSwiglu}) {
    EXPECT_EQ(parse_activation(to_string(a)), a);
  }
  EXPECT_EQ(parse_scoring("softmax"), Scoring::kSoftmax);
  EXPECT_EQ(parse_scoring("sigmoid"), Scoring::kSigmoid);
}

TEST(NamesTest, ParsersNameWhatCameAndWhatIsKnown) {
  expect_refused({"compute", "'float64'", "auto, float32, int16, bfloat16, int8"},
                 [] { parse_compute("float64"); });
  expect_refused({"activation", "'relu'", "silu, gelu, gelu_tanh, clamped_swiglu"},
                 [] { parse_activation("relu"); });
  expect_refused({"scoring", "''", "softmax, sigmoid"}, [] { parse_scoring(""); });
}

TEST(DeviceTest, ParsesAndPrints) {
  EXPECT_EQ(parse_device("cpu"), (Device{DeviceKind::kCpu, 0}));
  EXPECT_EQ(parse_device("cuda"), (Device{DeviceKind::kCuda, 0}));
  EXPECT_EQ(parse_device("cuda:0"), (Device{DeviceKind::kCuda, 0}));
  EXPECT_EQ(parse_device("cuda:17"), (Device{DeviceKind::kCuda, 17}));
  EXPECT_EQ(to_string(Device{}), "cpu");
  EXPECT_EQ(to_string(Device{DeviceKind::kCuda, 2}), "cuda:2");
  for (const char* text : {"", "cp", "CPU", "cpu:", "cuda:", "cuda:-1", "cuda:x", "cuda:1x",
                           "cuda: 1", "cuda:99999999999", "rocm:0"}) {
    expect_refused({"device", "'" + std::string(text) + "'", "'cpu', 'cuda' or 'cuda:N'"},
                   [&] { parse_device(text); });
  }
}

}  // namespace
}  // namespace marlinq
