// A handful of layers, blocks, and routing, through handles, on memory that nothing else touches, for
// compute-sanitizer: every allocation is as large as its matrix, inputs are written by the host
// alone, and everything is freed at the end. Without a sanitizer it is a small test. Needs no GoogleTest.
// Exit codes: 0 right, 1 wrong, 77 no device.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "marlinq/error.hpp"
#include "marlinq/handle.hpp"
#include "marlinq/registry.hpp"
#include "marlinq/routing.hpp"
#include "marlinq_tolerances.hpp"  // generated from tolerances.json
#include "support/generators.hpp"
#include "support/moe_reference.hpp"
#include "support/reference.hpp"

namespace {

using marlinq::DType;
using marlinq::test::Layer;
using marlinq::test::LayerOptions;
using marlinq::test::Matrix;
using marlinq::test::Order;
using marlinq::test::Product;
using marlinq::test::Zeros;

constexpr int kNoDevice = 77;
constexpr marlinq::Device kDevice = {marlinq::DeviceKind::kCuda, 0};

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

/// Device memory of so many bytes.
class Memory {
 public:
  explicit Memory(std::size_t bytes) { check(cudaMalloc(&data_, bytes), "cudaMalloc"); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { (void)cudaFree(data_); }
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

/// As support/compare.hpp judges: few elements against what was summed.
double error_over_bound(const Matrix& out, const Product& expected, std::int64_t m, DType x) {
  constexpr std::int64_t kSmall = 256;
  double bound = x == DType::kBFloat16 ? marlinq::test::tolerances::kCudaBfloat16
                                       : marlinq::test::tolerances::kCudaFloat16;
  double error = 0;
  double norm = 0;
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < expected.n; ++j) {
      const double y = expected.y[static_cast<std::size_t>(i * expected.n + j)];
      error += (out.at(i, j) - y) * (out.at(i, j) - y);
      norm += y * y;
    }
  }
  if (m * expected.n < kSmall) {
    bound *= marlinq::test::tolerances::kSmallOutputFactor;
    norm = 0;
    for (std::int64_t i = 0; i < m; ++i) norm += expected.energy[static_cast<std::size_t>(i)];
  }
  return std::sqrt(error / norm) / bound;
}

/// Runs m rows with memory of just their size; `gap` columns between the rows of x stay unwritten. The output
/// is NaN before: initcheck does not see what the copy engine writes there.
Matrix run(const marlinq::LinearHandle& linear, const marlinq::ContextHandle& context,
           cudaStream_t stream, const Matrix& x, std::int64_t m, DType out_dtype,
           std::int64_t gap) {
  const auto size = static_cast<std::int64_t>(marlinq::size_of(x.dtype()));
  const std::int64_t k = x.cols();
  const std::int64_t n = linear.out_features();
  const std::int64_t stride = k + gap;
  const Memory there(static_cast<std::size_t>(((m - 1) * stride + k) * size));
  check(cudaMemcpy2DAsync(there.data(), static_cast<std::size_t>(stride * size), x.data(),
                          static_cast<std::size_t>(k * size), static_cast<std::size_t>(k * size),
                          static_cast<std::size_t>(m), cudaMemcpyHostToDevice, stream),
        "copy of x");
  Matrix out(m, n, out_dtype);
  const std::size_t out_bytes = static_cast<std::size_t>(m * n) * marlinq::size_of(out_dtype);
  const Memory result(out_bytes);
  check(cudaMemsetAsync(result.data(), 0xff, out_bytes, stream), "filling of out");
  linear.forward(context, {there.data(), x.dtype(), kDevice, m, k, stride},
                 {result.data(), out_dtype, kDevice, m, n, n}, m);
  check(cudaMemcpyAsync(out.data(), result.data(), out_bytes, cudaMemcpyDeviceToHost, stream),
        "copy of out");
  check(cudaStreamSynchronize(stream), "forward");
  return out;
}

struct Rows {
  std::int64_t m = 1;
  std::int64_t gap = 0;
};

struct Case {
  LayerOptions layer;
  std::vector<Rows> rows = {{1, 0}, {16, 0}, {17, 8}, {64, 0}, {130, 3}};
  std::vector<DType> dtypes = {DType::kFloat16, DType::kBFloat16};
  std::int64_t checked = 130;  // of the rows, at most: the reference takes its time
};

/// Layers of every format, and layers that make each kernel for many tokens run on a GPU with 132
/// multiprocessors, with and without tiles that are cut between blocks, and those for few tokens in
/// clusters.
std::vector<Case> cases() {
  std::vector<Case> all;
  const std::vector<LayerOptions> formats = {
      {.bits = 4, .k = 704, .n = 192, .seed = 1},
      {.bits = 4,
       .k = 704,
       .n = 201,
       .group_size = 64,
       .zeros = Zeros::kAsymmetricV1,
       .bias = DType::kFloat16,
       .seed = 2},
      {.bits = 4,
       .k = 600,
       .n = 130,
       .group_size = 32,
       .zeros = Zeros::kAsymmetricV2,
       .order = Order::kUnbalanced,
       .scales = DType::kBFloat16,
       .seed = 3},
      {.bits = 8, .k = 512, .n = 96, .group_size = -1, .bias = DType::kFloat32, .seed = 4},
      {.bits = 8,
       .k = 417,
       .n = 67,
       .group_size = 128,
       .zeros = Zeros::kAsymmetricV1,
       .order = Order::kActOrder,
       .scales = DType::kFloat32,
       .seed = 5},
      {.bits = 3, .k = 96, .n = 33, .group_size = 16, .zeros = Zeros::kAsymmetricV1, .seed = 6},
      {.bits = 4, .k = 320, .n = 192, .group_size = 32, .seed = 13}};
  for (const LayerOptions& layer : formats) all.emplace_back().layer = layer;
  const auto add_large = [&all](std::int64_t n, std::int64_t k, std::vector<Rows> rows) {
    Case& large = all.emplace_back();
    large.layer.bits = 4;
    large.layer.k = k;
    large.layer.n = n;
    large.layer.seed = all.size();
    large.rows = std::move(rows);
    large.dtypes = {DType::kFloat16};
    large.checked = 8;
  };
  add_large(6144, 1024, {{257, 0}, {520, 0}});
  add_large(6144, 2048, {{96, 0}, {130, 0}});
  add_large(1024, 4096, {{257, 0}});
  add_large(1024, 2048, {{130, 0}});
  add_large(4096, 1024, {{520, 0}});
  add_large(1024, 4096, {{1, 0}, {7, 0}, {16, 8}, {20, 0}, {30, 0}});
  return all;
}

/// How many results of a layer are wrong.
int run_layer(const Case& which, cudaStream_t stream, const marlinq::ContextHandle& context) {
  const LayerOptions& options = which.layer;
  const Layer layer = marlinq::test::make_layer(options);
  const marlinq::LinearHandle linear = context.load_gptq(layer.tensors(), layer.spec());
  std::int64_t most = 0;
  for (const Rows& rows : which.rows) most = std::max(most, rows.m);
  const std::int64_t checked = std::min(most, which.checked);
  int wrong = 0;
  double worst = 0;
  for (const DType dtype : which.dtypes) {
    const Matrix x = marlinq::test::random_matrix(most, options.k, dtype, options.seed + 100);
    const Product expected = marlinq::test::multiply(x.values(), checked, layer.dense());
    for (const auto& [m, gap] : which.rows) {
      const DType out_dtype = m == 17 ? DType::kFloat32 : dtype;
      const Matrix out = run(linear, context, stream, x, m, out_dtype, gap);
      const double error = error_over_bound(out, expected, std::min(m, checked), dtype);
      worst = std::fmax(worst, error);
      if (!(error <= 1)) {
        ++wrong;
        std::printf("  m %lld, %s: %.2f times the bound\n", static_cast<long long>(m),
                    std::string(to_string(dtype)).c_str(), error);
      }
    }
  }
  std::printf("%s %s: at most %.2f times the bound\n", wrong == 0 ? "ok   " : "WRONG",
              describe(options).c_str(), worst);
  return wrong;
}

/// Memory with a copy of a vector, or room for it.
template <class T>
class Array {
 public:
  Array(const std::vector<T>& values, marlinq::DType dtype, cudaStream_t stream)
      : size_(static_cast<std::int64_t>(values.size())), dtype_(dtype), memory_(bytes()) {
    check(cudaMemcpyAsync(memory_.data(), values.data(), bytes(), cudaMemcpyHostToDevice, stream),
          "copy in");
  }
  Array(std::int64_t size, marlinq::DType dtype) : size_(size), dtype_(dtype), memory_(bytes()) {}

  marlinq::MatrixView matrix(std::int64_t cols) const {
    return {memory_.data(), dtype_, kDevice, size_ / cols, cols, cols};
  }
  marlinq::ArrayView list() const { return {memory_.data(), dtype_, kDevice, size_}; }
  std::vector<T> read(cudaStream_t stream) const {
    std::vector<T> values(static_cast<std::size_t>(size_));
    check(cudaMemcpyAsync(values.data(), memory_.data(), bytes(), cudaMemcpyDeviceToHost, stream),
          "copy out");
    check(cudaStreamSynchronize(stream), "routing");
    return values;
  }

 private:
  std::size_t bytes() const { return static_cast<std::size_t>(size_) * sizeof(T); }

  std::int64_t size_;
  marlinq::DType dtype_;
  Memory memory_;
};

struct RoutingCase {
  std::int64_t tokens = 1;
  std::int64_t experts = 8;
  marlinq::RouteOptions options;
  int block_size = 16;
};

/// Experts for random logits, and the tiles of these, as on the host. How many results are wrong.
int run_routing(const RoutingCase& c, cudaStream_t stream, const marlinq::ContextHandle& context) {
  const int top_k = c.options.top_k;
  const std::int64_t count = c.tokens * top_k;
  marlinq::test::Random random(static_cast<std::uint64_t>(c.experts));
  std::vector<float> logits(static_cast<std::size_t>(c.tokens * c.experts));
  for (float& logit : logits) logit = static_cast<float>(random.normal());

  std::vector<std::int32_t> wanted_ids(static_cast<std::size_t>(count));
  std::vector<float> wanted_weights(static_cast<std::size_t>(count));
  const marlinq::Device host{};
  const marlinq::MatrixView ids_view{wanted_ids.data(), DType::kInt32, host,
                                     c.tokens,          top_k,         top_k};
  marlinq::route({logits.data(), DType::kFloat32, host, c.tokens, c.experts, c.experts}, c.options,
                 ids_view, {wanted_weights.data(), DType::kFloat32, host, c.tokens, top_k, top_k});
  const auto experts = static_cast<int>(c.experts);
  marlinq::TokenTiles wanted =
      marlinq::moe_align_block_size(as_const(ids_view), c.block_size, experts);

  const Array<float> in(logits, DType::kFloat32, stream);
  const Array<std::int32_t> ids(count, DType::kInt32);
  const Array<float> weights(count, DType::kFloat32);
  context.route(as_const(in.matrix(c.experts)), c.options, ids.matrix(top_k),
                weights.matrix(top_k));
  const std::int64_t most = marlinq::most_aligned_ids(count, c.block_size, experts);
  const Array<std::int32_t> tokens(most, DType::kInt32);
  const Array<std::int32_t> tiles(most / c.block_size, DType::kInt32);
  const Array<std::int32_t> past(1, DType::kInt32);
  context.moe_align_block_size(as_const(ids.matrix(top_k)), c.block_size, experts, {},
                               tokens.list(), tiles.list(), past.list());

  int wrong = 0;
  wrong += ids.read(stream) != wanted_ids;
  const std::vector<float> shares = weights.read(stream);
  for (std::size_t i = 0; i < shares.size(); ++i) {
    const double share = wanted_weights[i];
    const double bound = marlinq::test::tolerances::kRoutingCudaWeights * std::fabs(share);
    wrong += !(std::fabs(shares[i] - share) <= bound);
  }
  wanted.sorted_token_ids.resize(static_cast<std::size_t>(most), static_cast<std::int32_t>(count));
  wanted.expert_ids.resize(static_cast<std::size_t>(most / c.block_size), -1);
  wrong += tokens.read(stream) != wanted.sorted_token_ids;
  wrong += tiles.read(stream) != wanted.expert_ids;
  wrong += past.read(stream) != std::vector{wanted.num_tokens_past_padded};
  std::printf("%s routing of %lld tokens to %d of %d experts\n", wrong == 0 ? "ok   " : "WRONG",
              static_cast<long long>(c.tokens), top_k, experts);
  return wrong;
}

int run_routing(cudaStream_t stream, const marlinq::ContextHandle& context) {
  const std::vector<float> bias(256, 0.125F);
  int wrong = 0;
  for (const RoutingCase& c : std::vector<RoutingCase>{
           {.tokens = 1, .experts = 8, .options = {.top_k = 2}},
           {.tokens = 67, .experts = 60, .options = {.top_k = 4}, .block_size = 8},
           {.tokens = 33,
            .experts = 256,
            .options = {.top_k = 8,
                        .scoring = marlinq::Scoring::kSigmoid,
                        .correction_bias = bias,
                        .num_groups = 8,
                        .top_groups = 4},
            .block_size = 64},
           {.tokens = 300, .experts = 1024, .options = {.top_k = 16}}}) {
    wrong += run_routing(c, stream, context);
  }
  return wrong;
}

/// A copy of a matrix whose rows follow one another, in memory of its size.
class Uploaded {
 public:
  Uploaded(const Matrix& matrix, cudaStream_t stream)
      : view_(matrix.input()),
        memory_(static_cast<std::size_t>(view_.rows * view_.cols) * size_of(view_.dtype)) {
    check(cudaMemcpyAsync(memory_.data(), view_.data,
                          static_cast<std::size_t>(view_.rows * view_.cols) * size_of(view_.dtype),
                          cudaMemcpyHostToDevice, stream),
          "copy in");
    view_.data = memory_.data();
    view_.device = kDevice;
  }

  marlinq::ConstMatrixView input() const { return view_; }

 private:
  marlinq::ConstMatrixView view_;
  Memory memory_;
};

struct BlockCase {
  std::int64_t experts = 8;
  std::int64_t hidden = 128;
  std::int64_t inner = 96;
  int top_k = 2;
  int percent_absent = 20;  // of the ids
  LayerOptions layer;
  std::vector<std::int64_t> tokens = {1, 12, 40, 600};
};

std::string describe(const BlockCase& c) {
  return std::to_string(c.experts) + " experts of " + std::to_string(c.hidden) + " x " +
         std::to_string(c.inner) + ", " + marlinq::test::describe(c.layer);
}

/// A block of every number of tokens, with a shared expert. How many results are wrong.
int run_block(const BlockCase& c, cudaStream_t stream, const marlinq::ContextHandle& context) {
  LayerOptions up = c.layer;
  up.k = c.hidden;
  up.n = c.inner;
  LayerOptions down = c.layer;
  down.k = c.inner;
  down.n = c.hidden;
  down.seed += 50;
  const marlinq::test::Experts up_experts = marlinq::test::make_experts(c.experts, 2, up);
  const marlinq::test::Experts down_experts = marlinq::test::make_experts(c.experts, 1, down);
  const marlinq::test::Experts shared_up = marlinq::test::make_experts(1, 2, up);
  const marlinq::test::Experts shared_down = marlinq::test::make_experts(1, 1, down);
  marlinq::test::MoeReference reference;
  reference.gate_up = up_experts.dense();
  reference.down = down_experts.dense();
  reference.shared = {shared_up.dense()[0], shared_down.dense()[0]};
  const marlinq::MoeBlockHandle block = context.make_moe_block(
      {.gate_up = context.load_gptq_stacked(up_experts.tensors(), up_experts.spec()),
       .down = context.load_gptq_stacked(down_experts.tensors(), down_experts.spec()),
       .shared_gate_up = context.load_gptq(shared_up.tensors()[0], shared_up.spec()),
       .shared_down = context.load_gptq(shared_down.tensors()[0], shared_down.spec())});
  int wrong = 0;
  double worst = 0;
  for (const std::int64_t tokens : c.tokens) {
    marlinq::test::Random random(static_cast<std::uint64_t>(tokens));
    const Matrix x =
        marlinq::test::random_matrix(tokens, c.hidden, DType::kFloat16, c.layer.seed + 100);
    const Matrix ids = marlinq::test::random_topk_ids(tokens, c.top_k, c.experts, DType::kInt32,
                                                      c.percent_absent, random);
    const Matrix weights = marlinq::test::random_topk_weights(tokens, c.top_k, random);
    const std::vector<double> expected = reference.forward(x, ids, weights);
    const Uploaded x_there(x, stream);
    const Uploaded ids_there(ids, stream);
    const Uploaded weights_there(weights, stream);
    const Array<float> out(tokens * c.hidden, DType::kFloat32);
    block.forward(context,
                  {.x = x_there.input(),
                   .topk_ids = ids_there.input(),
                   .topk_weights = weights_there.input()},
                  out.matrix(c.hidden));
    const std::vector<float> y = out.read(stream);
    double error = 0;
    double norm = 0;
    for (std::size_t i = 0; i < y.size(); ++i) {
      error += (y[i] - expected[i]) * (y[i] - expected[i]);
      norm += expected[i] * expected[i];
    }
    // A single row may cancel more than the many that the bound is for.
    const double bound =
        (tokens == 1 ? 3 : 1) * marlinq::test::tolerances::kCudaMoeFloat16 * std::sqrt(norm);
    const double over = std::sqrt(error) / bound;
    worst = std::fmax(worst, over);
    if (!(over <= 1)) {
      ++wrong;
      std::printf("  %lld tokens: %.2f times the bound\n", static_cast<long long>(tokens), over);
    }
  }
  std::printf("%s block of %s: at most %.2f times the bound\n", wrong == 0 ? "ok   " : "WRONG",
              describe(c).c_str(), worst);
  return wrong;
}

/// Blocks whose activation is a step of the product or a kernel of its own, with tiles that are cut and
/// tiles that are not.
int run_blocks(cudaStream_t stream, const marlinq::ContextHandle& context) {
  std::vector<BlockCase> all(4);
  all[0].layer = {.bits = 4, .group_size = 32, .seed = 60};
  all[1].experts = 20;
  all[1].hidden = 704;
  all[1].inner = 160;
  all[1].layer = {.bits = 4,
                  .group_size = 32,
                  .zeros = Zeros::kAsymmetricV1,
                  .bias = DType::kFloat16,
                  .seed = 61};
  all[1].tokens = {3, 70};
  // The kernel that activates also takes rows of absent ids, which nobody has written and nobody reads.
  all[2].percent_absent = 0;
  all[2].experts = 3;
  all[2].hidden = 96;
  all[2].inner = 72;
  all[2].layer = {.bits = 8, .group_size = 24, .order = Order::kActOrder, .seed = 62};
  all[2].tokens = {5, 33};
  // Groups of whole chunks, and halves of whole packed blocks: tiles of sm90.
  all[3].hidden = 256;
  all[3].inner = 128;
  all[3].layer = {.bits = 4, .group_size = 64, .zeros = Zeros::kAsymmetricV1, .seed = 63};
  all[3].tokens = {40, 600};
  int wrong = 0;
  for (const BlockCase& c : all) wrong += run_block(c, stream, context);
  return wrong;
}

int run_all() {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  int wrong = 0;
  {
    const marlinq::ContextHandle context = marlinq::open_context(kDevice, {.stream = stream});
    for (const Case& which : cases()) wrong += run_layer(which, stream, context);
    wrong += run_routing(stream, context);
    wrong += run_blocks(stream, context);
  }
  check(cudaStreamDestroy(stream), "cudaStreamDestroy");
  return wrong;
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return kNoDevice;
  }
  try {
    return run_all() == 0 ? 0 : 1;
  } catch (const marlinq::Error& error) {
    std::fprintf(stderr, "%s: %s\n", std::string(to_string(error.code())).c_str(), error.what());
    return 1;
  }
}
