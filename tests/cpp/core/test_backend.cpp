// The trait's defaults, through a backend that overrides nothing.
#include <gtest/gtest.h>

#include <vector>

#include "support/compare.hpp"
#include "support/null_backend.hpp"

namespace marlinq {
namespace {

using test::expect_error;
using test::NullBackend;
using test::NullContext;

TEST(NullBackendTest, LoadersNameBackendAndOperation) {
  NullContext context;
  const GptqTensors tensors;
  expect_error(ErrorCode::kUnsupported, {"backend 'null'", "load_gptq"},
               [&] { NullBackend::load_gptq(context, tensors, {}, {}); });
  const std::vector<GptqTensors> experts(2);
  expect_error(ErrorCode::kUnsupported, {"backend 'null'", "load_gptq_stacked"},
               [&] { NullBackend::load_gptq_stacked(context, experts, {}, {}); });
}

TEST(NullBackendTest, MoeAndRoutingNameBackendAndOperation) {
  NullContext context;
  expect_error(ErrorCode::kUnsupported, {"backend 'null'", "make_moe_block"},
               [&] { NullBackend::make_moe_block(context, {}); });
  expect_error(ErrorCode::kUnsupported, {"backend 'null'", "route"},
               [&] { NullBackend::route(context, {}, {}, {}, {}); });
  expect_error(ErrorCode::kUnsupported, {"backend 'null'", "moe_align_block_size"},
               [&] { NullBackend::moe_align_block_size(context, {}, 8, 1, {}, {}, {}, {}); });
}

struct NullLinear final : Linear<NullBackend> {
  std::int64_t in_features() const noexcept override { return 1; }
  std::int64_t out_features() const noexcept override { return 1; }
  void forward(NullContext&, const ConstMatrixView&, const MatrixView&,
               std::int64_t) const override {}
  Description describe() const override { return {}; }
};

TEST(NullBackendTest, TuneNamesBackendAndOperation) {
  NullContext context;
  expect_error(ErrorCode::kUnsupported, {"backend 'null'", "tune"},
               [&] { NullBackend::tune(context, NullLinear(), {}, DType::kFloat16); });
}

TEST(NullBackendTest, PregrowDoesNothing) {
  NullContext context;
  EXPECT_NO_THROW(NullBackend::pregrow_marlin_gather_scratch(context, 0));
  EXPECT_NO_THROW(NullBackend::pregrow_marlin_gather_scratch(context, INT64_MAX));
}

}  // namespace
}  // namespace marlinq
