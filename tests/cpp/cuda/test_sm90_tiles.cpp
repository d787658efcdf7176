// Every wgmma kernel of products on a real device, also those that no plan takes for shapes like these, against
// float64: K of an odd number of chunks, a last tile of few features and of few tokens, groups that begin in either
// chunk of a slab, tiles cut along K in every way. Where every tile is cut alike, all kernels give a row the same bytes:
// batch-invariant layers choose among them.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "cuda/arch/sm90/launch.hpp"
#include "cuda/arch/sm90/tile_plan.hpp"
#include "cuda/arch_table.hpp"
#include "cuda/context.hpp"
#include "cuda/cuda_check.hpp"
#include "cuda/layers_to_load.hpp"
#include "cuda/upload.hpp"
#include "marlinq/registry.hpp"
#include "support/compare.hpp"
#include "support/device_matrix.hpp"

namespace marlinq {
namespace {

using cuda::CudaBuffer;
using cuda::FloatType;
using cuda::GemmPlan;
using cuda::GemmProblem;
using cuda::KernelKind;
using test::DeviceMatrix;
using test::Layer;
using test::LayerOptions;
using test::Matrix;
using test::Zeros;

constexpr std::int64_t kRows = 352;  // a tile of the most tokens, and part of another

class Sm90TilesTest : public ::testing::TestWithParam<LayerOptions> {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "no CUDA device";
    limits_ = cuda::device_limits(0);
    if (limits_.capability != 90) GTEST_SKIP() << "its capability is not 9.0";
    context_.emplace(open_context({DeviceKind::kCuda, 0}));
    std::int64_t floats = 0;
    std::int32_t flags = 0;
    arch().scratch_need(limits_, floats, flags);
    partials_ = CudaBuffer(0, DType::kFloat32, floats);
    flags_ = CudaBuffer(0, DType::kInt32, flags);
    MARLINQ_CUDA_CHECK(cudaMemset(flags_.data(), 0, static_cast<std::size_t>(flags) * 4));
  }

  const cuda::ArchKernels& arch() const { return cuda::choose_arch("sm90", limits_.capability); }

  cuda::DeviceWeight load(const Layer& layer) const {
    const GptqTensors tensors = layer.tensors();
    const GptqSpec spec = layer.spec();
    cuda::LayersToLoad layers({&tensors, 1}, spec);
    cuda::Uploader uploader(0);
    cuda::LayerUpload upload(uploader, layers);
    cuda::DeviceWeight weight = arch().pack(layers, upload);
    weight.ready.wait();
    return weight;
  }

  /// All kernels of tiles with an x and outputs of this type.
  void run_all(const Layer& layer, DType dtype) const {
    const cuda::DeviceWeight weight = load(layer);
    const std::int64_t k = layer.options.k;
    const Matrix x = test::random_matrix(kRows, k, dtype, 7);
    const test::Product expected = test::multiply(x.values(), kRows, layer.dense());
    const DeviceMatrix input(*context_, x);
    const FloatType type = dtype == DType::kFloat16 ? FloatType::kF16 : FloatType::kBF16;
    if (!cuda::sm90::has_tiles(weight.segments[0].view, type)) {
      // Codes of short groups are multiplied by scales of their own type.
      EXPECT_TRUE(type == FloatType::kF16 && layer.options.group_size < 128 &&
                  layer.options.scales != DType::kFloat16);
      return;
    }
    const auto kernels = cuda::sm90::instances(type, weight.segments[0].view.code_bits);
    std::map<std::int32_t, std::vector<unsigned char>> first_rows;  // by parts
    int run = 0;
    for (std::size_t i = 0; i < kernels.size(); ++i) {
      const cuda::sm90::Instance& kernel = kernels[i];
      if (kernel.kind != KernelKind::kTile) continue;
      const std::int64_t m = kernel.tokens + kernel.tokens / 3;
      const GemmProblem problem{.weight = weight.segments[0].view,
                                .x = input.input().data,
                                .x_type = type,
                                .x_stride = input.input().row_stride,
                                .x_columns = static_cast<std::int32_t>(k),
                                .y_type = type,
                                .m = static_cast<std::int32_t>(m)};
      for (const GemmPlan& plan : plans(problem, static_cast<std::int32_t>(i))) {
        ASSERT_LE(plan.shared_bytes, limits_.shared_bytes);
        Matrix y(kRows, layer.options.n, dtype);
        test::with_output(*context_, y, [&](const MatrixView& output) {
          GemmProblem writes = problem;
          writes.y = output.data;
          writes.y_stride = output.row_stride;
          arch().launch(
              writes, plan,
              {static_cast<float*>(partials_.data()), static_cast<std::uint32_t*>(flags_.data())},
              context_->stream());
        });
        EXPECT_TRUE(test::matches_within(y, expected, m, bound_of(dtype)))
            << to_string(dtype) << ", " << kernel.blocks * 64 << " features x " << kernel.tokens
            << " tokens, clusters of " << kernel.cluster_blocks << ", " << plan.blocks
            << " blocks, tail " << plan.schedule.tail_blocks << " / " << plan.schedule.tail_tiles
            << ", parts " << plan.schedule.parts << ", in pairs " << plan.schedule.pair_parts;
        if (plan.schedule.parts > 0) {
          constexpr std::int64_t kRowsOfAll = 16;
          const std::vector<unsigned char> rows = y.row_bytes(0, kRowsOfAll);
          EXPECT_EQ(rows, first_rows.try_emplace(plan.schedule.parts, rows).first->second)
              << kernel.blocks * 64 << " features x " << kernel.tokens << " tokens, parts "
              << plan.schedule.parts;
        }
        ++run;
      }
    }
    // Kernels and cuts; two of them do not work in pairs.
    EXPECT_EQ(run, 16 * 7 + 14 * 3);
  }

 private:
  static double bound_of(DType dtype) {
    return dtype == DType::kFloat16 ? test::tolerances::kCudaFloat16
                                    : test::tolerances::kCudaBfloat16;
  }

  // Each tile by one block or by several, evenly or not, cut as for batch-invariant layers, and by pairs of blocks.
  std::vector<GemmPlan> plans(const GemmProblem& problem, std::int32_t index) const {
    std::vector<GemmPlan> result;
    const std::int32_t left = cuda::sm90::tile_plan(problem, index, limits_, 1).schedule.tail_tiles;
    for (const std::int32_t tail : {left, 2 * left, 2 * left + 1, 5 * left}) {
      result.push_back(cuda::sm90::tile_plan(problem, index, limits_, tail));
    }
    for (const std::int32_t parts : {1, 2, 3}) {
      result.push_back(cuda::sm90::cut_tile_plan(problem, index, limits_, parts));
    }
    // K has 6 slabs.
    for (const std::int32_t parts : {2, 4, 6}) {
      const GemmPlan plan = cuda::sm90::tile_pairs_plan(problem, index, limits_, parts);
      if (plan.shared_bytes < INT32_MAX) result.push_back(plan);
    }
    return result;
  }

  cuda::DeviceLimits limits_;
  std::optional<ContextHandle> context_;
  CudaBuffer partials_, flags_;
};

TEST_P(Sm90TilesTest, EveryKernelAndCut) {
  const Layer layer = test::make_layer(GetParam());
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) run_all(layer, dtype);
}

// K of 11 chunks of 64 rows; 328 features are 5 packed blocks and an eighth of one. Rows of 333 outputs cannot be stored
// 16 bytes at a time.
INSTANTIATE_TEST_SUITE_P(
    , Sm90TilesTest,
    ::testing::Values(LayerOptions{.k = 704, .n = 328, .name = "groups_of_128"},
                      LayerOptions{.k = 704,
                                   .n = 333,
                                   .group_size = 64,
                                   .zeros = Zeros::kAsymmetricV1,
                                   .name = "groups_of_64_asymmetric"},
                      LayerOptions{.k = 704, .n = 328, .group_size = 32, .name = "groups_of_32"},
                      LayerOptions{.bits = 8,
                                   .k = 704,
                                   .n = 328,
                                   .group_size = 32,
                                   .zeros = Zeros::kAsymmetricV1,
                                   .name = "bits_8_groups_of_32_asymmetric"},
                      LayerOptions{.k = 704,
                                   .n = 328,
                                   .group_size = 32,
                                   .zeros = Zeros::kAsymmetricV1,
                                   .scales = DType::kBFloat16,
                                   .name = "groups_of_32_asymmetric_bfloat16_scales"},
                      LayerOptions{.k = 704,
                                   .n = 328,
                                   .group_size = 64,
                                   .scales = DType::kFloat32,
                                   .name = "groups_of_64_float32_scales"},
                      LayerOptions{.k = 704,
                                   .n = 328,
                                   .group_size = 704,
                                   .bias = DType::kFloat16,
                                   .name = "one_group_bias"},
                      LayerOptions{.bits = 8,
                                   .k = 704,
                                   .n = 328,
                                   .zeros = Zeros::kAsymmetricV1,
                                   .scales = DType::kBFloat16,
                                   .name = "bits_8_asymmetric_bfloat16_scales"}),
    [](const auto& tested) { return tested.param.name; });

}  // namespace
}  // namespace marlinq
