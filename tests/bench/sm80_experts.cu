// Times the products over experts of the sm_80 kernels on one GPU, with tiles of every size and every way
// to share the last of them: one line of CSV each, with its time in us. What a block estimates by itself
// (ExpertCost) is fitted to these lines. The numbers are not looked at: tests/python/test_cuda_moe.py does.
//
// Usage: sm80_experts [begin of model names] [T ...]
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "core/integers.hpp"
#include "cuda/arch/sm80/experts.hpp"
#include "cuda/arch/sm80/layout.hpp"
#include "cuda/context.hpp"
#include "cuda/cuda_check.hpp"
#include "cuda/moe/align.hpp"
#include "cuda/moe/elementwise.hpp"
#include "replay.cuh"

namespace {

using namespace marlinq;
using namespace marlinq::cuda;
using bench::time_us;

struct Model {
  const char* name;
  int experts, top_k, hidden, inner;
};
constexpr Model kModels[] = {{"qwen3-30b-a3b", 128, 8, 2048, 768},
                             {"mixtral-8x7b", 8, 2, 4096, 14336},
                             {"deepseek-v3", 256, 8, 7168, 2048}};

class Bench {
 public:
  explicit Bench(const Model& model) : model_(model) {
    MARLINQ_CUDA_CHECK(cudaStreamCreate(&stream_));
    limits_ = device_limits(0);
    const ArchKernels& arch = choose_arch("sm80", limits_.capability);
    std::int64_t floats = 0;
    std::int32_t flags = 0;
    arch.scratch_need(limits_, floats, flags);
    partials_ = CudaBuffer(0, DType::kFloat32, floats);
    flags_ = CudaBuffer(0, DType::kInt32, flags);
    MARLINQ_CUDA_CHECK(cudaMemset(flags_.data(), 0, static_cast<std::size_t>(flags) * 4));
  }

  void run(int tokens) {
    const std::int64_t ids = std::int64_t{tokens} * model_.top_k;
    ids_ = CudaBuffer(0, DType::kInt32, ids);
    std::vector<std::int32_t> chosen;
    std::mt19937 random(static_cast<unsigned>(tokens));
    std::vector<std::int32_t> all(static_cast<std::size_t>(model_.experts));
    std::iota(all.begin(), all.end(), 0);
    for (int t = 0; t < tokens; ++t) {
      std::shuffle(all.begin(), all.end(), random);
      chosen.insert(chosen.end(), all.begin(), all.begin() + model_.top_k);
    }
    MARLINQ_CUDA_CHECK(
        cudaMemcpy(ids_.data(), chosen.data(), chosen.size() * 4, cudaMemcpyHostToDevice));
    for (const int rows : {8, 16, 32, 64}) {
      const double average = static_cast<double>(ids) / model_.experts;
      if (rows > 8 && (tokens <= rows / 2 || average < rows / 16.0)) continue;
      if (rows < 64 && average > 4 * rows) continue;
      sort(tokens, rows);
      products(tokens, rows);
    }
  }

 private:
  // What a product over one of several copies of a stack takes.
  struct Product {
    CudaBuffer stack, x, y;
    std::vector<ExpertProblem> problems;
    ExpertPlan plan;
  };

  void sort(int tokens, int rows) {
    const std::int64_t ids = std::int64_t{tokens} * model_.top_k;
    tiles_ = most_expert_tiles(ids, model_.experts, rows);
    lists_ = CudaBuffer(0, DType::kInt32, ids + 3 * tiles_ + 1);
    auto* list = static_cast<std::int32_t*>(lists_.data());
    sorted_ = {.ids = list,
               .experts = list + ids,
               .first = list + ids + tiles_,
               .rows = list + ids + 2 * tiles_,
               .count = list + ids + 3 * tiles_};
    topk_ = {.data = ids_.data(),
             .wide = false,
             .row_stride = model_.top_k,
             .tokens = tokens,
             .top_k = model_.top_k};
    tile_lists_ = {.experts = sorted_.experts,
                   .ids = sorted_.ids,
                   .first = sorted_.first,
                   .rows = sorted_.rows,
                   .used = sorted_.count,
                   .tile_rows = rows,
                   .most_tiles = static_cast<std::int32_t>(tiles_),
                   .most_slots = ids,
                   .num_ids = static_cast<std::int32_t>(ids)};
    print("sort", tokens, rows, 0, 0, time_us(stream_, 50, 5, [&](int) { run_sort(rows); }));
  }

  void run_sort(int rows) { sort_by_expert(topk_, model_.experts, rows, sorted_, true, stream_); }

  void print(const char* step, int tokens, int rows, int kernel, int share, double us) const {
    std::printf("%s,%s,%d,%d,%d,%d,%.2f\n", model_.name, step, tokens, rows, kernel, share, us);
    std::fflush(stdout);
  }

  // Of gate_up with its activation, or of down, whose rows lie in the order of the sorted tokens.
  Product make_product(int tokens, int n, int k, bool up) const {
    sm80::Layout layout{.code_bits = 4, .scale_bytes = 2, .has_zeros = false, .n = n};
    layout.chunks = k / 64;
    layout.groups = k / 128;
    const std::int64_t expert = round_up(layout.words() * 4 + layout.group_bytes(), 256);
    // Whole stacks until the L2 cache holds little of what is read next.
    const double active = std::min<double>(model_.experts, tokens * model_.top_k);
    const auto copies =
        static_cast<int>(std::clamp(170e6 / (active * static_cast<double>(expert)) + 1, 1.0, 12.0));
    const std::int64_t ids = std::int64_t{tokens} * model_.top_k;
    Product product{.stack = CudaBuffer(0, DType::kInt32, copies * model_.experts * expert / 4),
                    .x = CudaBuffer(0, DType::kFloat16, ids * k),
                    .y = CudaBuffer(0, DType::kFloat32, ids * n),
                    .problems = {},
                    .plan = {}};
    MARLINQ_CUDA_CHECK(
        cudaMemset(product.stack.data(), 0x37, static_cast<std::size_t>(product.stack.size()) * 4));
    MARLINQ_CUDA_CHECK(cudaMemset(product.x.data(), 0, static_cast<std::size_t>(ids) * k * 2));
    for (int copy = 0; copy < copies; ++copy) {
      const auto* memory =
          static_cast<const unsigned char*>(product.stack.data()) + copy * model_.experts * expert;
      product.problems.push_back(
          {.matrix = {.weight = {.codes = reinterpret_cast<const std::uint32_t*>(memory),
                                 .groups = memory + layout.words() * 4,
                                 .chunk_groups = reinterpret_cast<const std::int32_t*>(memory),
                                 .chunk_shift = 1,
                                 .record_bytes = layout.record_bytes(),
                                 .n = n,
                                 .k = k,
                                 .chunks = static_cast<std::int32_t>(layout.chunks),
                                 .num_groups = static_cast<std::int32_t>(layout.groups)},
                      .x = product.x.data(),
                      .x_stride = k,
                      .x_columns = k,
                      .y = product.y.data(),
                      .y_type = up ? FloatType::kF16 : FloatType::kF32,
                      .y_stride = up ? n / 2 : n},
           .expert_bytes = expert,
           .num_experts = model_.experts,
           .tiles = tile_lists_,
           .top_k = up ? model_.top_k : 1,
           .x_by_slot = !up,
           .y_by_slot = up,
           .activates = up});
    }
    product.plan = sm80::plan_experts(product.problems[0], limits_, BatchInvariance::kNotRequired);
    return product;
  }

  void launch(const Product& product, int i) const {
    const SplitScratch scratch{static_cast<float*>(partials_.data()),
                               static_cast<std::uint32_t*>(flags_.data())};
    sm80::launch_experts(product.problems[static_cast<std::size_t>(i) % product.problems.size()],
                         product.plan, limits_, scratch, stream_);
  }

  void time_product(Product& product, const char* step, int tokens, int rows) {
    const auto measure = [&](int share) {
      product.plan.share = share;
      const int repeats = std::max(20, static_cast<int>(product.problems.size()));
      print(step, tokens, rows, product.plan.instance, share,
            time_us(stream_, repeats, 5, [&](int i) { launch(product, i); }));
    };
    const ExpertPlan chosen = product.plan;
    if (rows <= 8) {
      for (const std::size_t kernel : {0, 1}) {
        product.plan = sm80::plan_experts_with(kernel, product.problems[0], limits_,
                                               BatchInvariance::kNotRequired);
        for (const int share : {0, 1, 2, 4, 8}) measure(share);
      }
    } else {
      for (const int share : {0, 1, 2, 3, 4, 6, 8, 12, 16, 32}) measure(share);
    }
    product.plan = chosen;
    measure(0);
  }

  void products(int tokens, int rows) {
    Product up = make_product(tokens, 2 * model_.inner, model_.hidden, true);
    time_product(up, "up", tokens, rows);
    Product down = make_product(tokens, model_.hidden, model_.inner, false);
    time_product(down, "down", tokens, rows);
    // All of a block, the rows of down being what gate_up wrote.
    const std::int64_t ids = std::int64_t{tokens} * model_.top_k;
    for (ExpertProblem& problem : down.problems) {
      problem.matrix.x = up.y.data();
      problem.tiles.settled = true;
    }
    const CudaBuffer y(0, DType::kFloat16, std::int64_t{tokens} * model_.hidden);
    const CudaBuffer weights(0, DType::kFloat32, ids);
    const CombineProblem sum{.expert_output = {down.y.data(), FloatType::kF32, model_.hidden},
                             .topk_ids = topk_,
                             .num_experts = model_.experts,
                             .topk_weights = static_cast<const float*>(weights.data()),
                             .topk_weights_stride = model_.top_k,
                             .out = {y.data(), FloatType::kF16, model_.hidden},
                             .hidden = model_.hidden};
    print("combine", tokens, rows, 0, 0,
          time_us(stream_, 50, 5, [&](int) { combine(sum, limits_, true, stream_); }));
    const int repeats = std::max(20, static_cast<int>(up.problems.size()));
    print("products", tokens, rows, 0, 0, time_us(stream_, repeats, 5, [&](int i) {
            launch(up, i);
            launch(down, i);
          }));
    print("block", tokens, rows, 0, 0, time_us(stream_, repeats, 5, [&](int i) {
            run_sort(rows);
            launch(up, i);
            launch(down, i);
            combine(sum, limits_, true, stream_);
          }));
    if (rows > 8 || ids > sm80::kMostSortedIds) return;
    for (Product* product : {&up, &down}) {
      for (ExpertProblem& problem : product->problems) problem.tiles.topk = topk_;
      product->plan =
          sm80::plan_experts(product->problems[0], limits_, BatchInvariance::kNotRequired);
    }
    print("sorting block", tokens, rows, 0, 0, time_us(stream_, repeats, 5, [&](int i) {
            launch(up, i);
            launch(down, i);
            combine(sum, limits_, true, stream_);
          }));
  }

  Model model_;
  cudaStream_t stream_ = nullptr;
  DeviceLimits limits_;
  CudaBuffer partials_, flags_, ids_, lists_;
  std::int64_t tiles_ = 0;
  ExpertTiles sorted_ = {};
  TopkIds topk_ = {};
  TokenTileLists tile_lists_;
};

}  // namespace

int main(int argc, char** argv) try {
  const char* only = argc > 1 ? argv[1] : "";
  std::vector<int> tokens;
  for (int i = 2; i < argc; ++i) tokens.push_back(std::atoi(argv[i]));
  if (tokens.empty()) tokens = {1, 4, 16, 64, 256, 1024};
  std::printf("model,step,tokens,tile_rows,kernel,share,us\n");
  for (const Model& model : kModels) {
    if (std::strncmp(model.name, only, std::strlen(only)) != 0) continue;
    Bench bench(model);
    for (const int t : tokens) bench.run(t);
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
