// The products over experts of the sm90 kernels on one GPU. "check" compares small ones with float64, of every
// kind; the rest times large ones with tiles of every size, and those of sm80 beside them: one line of CSV each,
// with its time in us and, of products, how far the outputs are from those of sm80.
//
// Usage: sm90_experts check | [uniform | zipf | one] [begin of model names] [T ...] [share=S ...] [rows=R ...]
//        [kernel=I ...] [bits=8] [group=G] [aligned] [products]
// Kernels are tiles by rising rows, and last the one for few rows, which has no activations.
// "aligned": through the lists of moe_align_block_size too, without an activation. "products": those of sm90 alone, or with
// "aligned" of these lists alone.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/integers.hpp"
#include "cuda/arch/sm80/layout.hpp"
#include "cuda/arch/sm90/experts.hpp"
#include "cuda/context.hpp"
#include "cuda/cuda_check.hpp"
#include "cuda/layers_to_load.hpp"
#include "cuda/moe/align.hpp"
#include "cuda/moe/elementwise.hpp"
#include "marlinq/gptq.hpp"
#include "replay.cuh"

namespace {

using namespace marlinq;
using namespace marlinq::cuda;
using bench::time_us;

__host__ __device__ std::uint64_t mix(std::uint64_t i) {
  std::uint64_t z = (i + 1) * 0x9E3779B97F4A7C15ULL;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return z ^ (z >> 31);
}

__device__ float normal_like(std::uint64_t i) {
  float sum = 0;
  for (int j = 0; j < 4; ++j) {
    sum += static_cast<float>(mix(i * 4 + static_cast<std::uint64_t>(j)) >> 40) * 0x1p-24f - 0.5f;
  }
  return sum * 1.732f;
}

template <class T>
__global__ void fill_normal(T* x, std::size_t count) {
  for (std::size_t i = blockIdx.x * 256 + threadIdx.x; i < count; i += std::size_t{gridDim.x} * 256)
    x[i] = T(normal_like(i));
}

/// Codes of any bits, and after them scales of 2^-7 to 2^-6, of each expert.
__global__ void fill_experts(std::uint32_t* words, std::int64_t count, std::int64_t expert_words,
                             std::int64_t code_words) {
  for (std::int64_t i = blockIdx.x * 256 + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * 256) {
    const auto bits = static_cast<std::uint32_t>(mix(static_cast<std::uint64_t>(i)));
    words[i] = i % expert_words < code_words ? bits : 0x20002000u + (bits & 0x03ff03ffu);
  }
}

template <class T>
__global__ void add_difference(const T* y, const T* expected, std::size_t count, double* sums) {
  double error = 0, norm = 0;
  for (std::size_t i = blockIdx.x * 256 + threadIdx.x; i < count;
       i += std::size_t{gridDim.x} * 256) {
    const double d = static_cast<double>(float(y[i])) - static_cast<double>(float(expected[i]));
    error += d * d;
    norm += static_cast<double>(float(expected[i])) * static_cast<double>(float(expected[i]));
  }
  atomicAdd(sums, error);
  atomicAdd(sums + 1, norm);
}

template <class V>
CudaBuffer upload(const std::vector<V>& values) {
  CudaBuffer buffer(0, DType::kInt32,
                    ceil_div(static_cast<std::int64_t>(values.size() * sizeof(V)), 4));
  MARLINQ_CUDA_CHECK(
      cudaMemcpy(buffer.data(), values.data(), values.size() * sizeof(V), cudaMemcpyHostToDevice));
  return buffer;
}

struct Scratch {
  CudaBuffer partials, flags;

  explicit Scratch(const DeviceLimits& limits) {
    std::int64_t floats = 0;
    std::int32_t count = 0;
    for (const ArchKernels* arch : arch_kernels()) {
      std::int64_t need_floats = 0;
      std::int32_t need_flags = 0;
      arch->scratch_need(limits, need_floats, need_flags);
      floats = std::max(floats, need_floats);
      count = std::max(count, need_flags);
    }
    partials = CudaBuffer(0, DType::kFloat32, floats);
    flags = CudaBuffer(0, DType::kInt32, count);
    MARLINQ_CUDA_CHECK(cudaMemset(flags.data(), 0, static_cast<std::size_t>(count) * 4));
  }
  SplitScratch view() const {
    return {static_cast<float*>(partials.data()), static_cast<std::uint32_t*>(flags.data())};
  }
};

std::vector<std::int32_t> route(const std::string& how, int tokens, int top_k, int experts) {
  std::mt19937 random(static_cast<unsigned>(tokens));
  std::vector<std::int32_t> ids;
  std::vector<std::int32_t> all(static_cast<std::size_t>(experts));
  std::iota(all.begin(), all.end(), 0);
  std::vector<double> zipf;
  for (int e = 0; e < experts; ++e) zipf.push_back(1.0 / (e + 1));
  for (int t = 0; t < tokens; ++t) {
    if (how == "zipf") {
      std::vector<double> left = zipf;
      for (int i = 0; i < top_k; ++i) {
        const int e = std::discrete_distribution<int>(left.begin(), left.end())(random);
        left[static_cast<std::size_t>(e)] = 0;
        ids.push_back(e);
      }
    } else if (how == "one") {
      for (int i = 0; i < top_k; ++i) ids.push_back(i == 0 ? 1 : -1);
    } else {
      std::shuffle(all.begin(), all.end(), random);
      ids.insert(ids.end(), all.begin(), all.begin() + top_k);
    }
  }
  return ids;
}

constexpr int kStrips = static_cast<int>(sm90::kExpertInstanceCount);
constexpr int kKernels = kStrips + 1;

ExpertPlan plan_of(int kernel, const ExpertProblem& problem, const DeviceLimits& limits) {
  return kernel == kStrips
             ? sm90::expert_strip_plan(problem, limits)
             : sm90::expert_tile_plan(static_cast<std::size_t>(kernel), problem, limits);
}

// --- check ---

struct Case {
  const char* name;
  int bits = 4;
  bool symmetric = true;
  int group = 128;
  bool bias = false;
  bool activates = false;
  Activation activation = Activation::kSilu;
  bool f32 = false;
  int weighs = 0;                // 1: the bias too, 2: all but the bias
  const char* lists = "sorted";  // or "aligned", "dispatched"
  bool turned = false;           // padding comes first in each tile of the aligned lists
  const char* routing = "uniform";
  int tile_rows = 128;
  int tokens = 300;
  int n = 512, k = 768;
  int experts = 6, top_k = 2;
};

template <class T>
__global__ void product64(const std::uint32_t* qweight, const std::uint32_t* qzeros,
                          const __half* scales, const T* x, const int* expert_of,
                          const int* x_row_of, double* y, int n, int k, int bits, int group) {
  const int column = blockIdx.x * 128 + threadIdx.x;
  const int row = blockIdx.y;
  const int expert = expert_of[row];
  if (column >= n || expert < 0) return;
  const int groups = k / group;
  qweight += static_cast<std::size_t>(expert) * (k * bits / 32) * n;
  qzeros += static_cast<std::size_t>(expert) * groups * (n * bits / 32);
  scales += static_cast<std::size_t>(expert) * groups * n;
  x += static_cast<std::size_t>(x_row_of[row]) * k;
  const std::uint32_t mask = (1u << bits) - 1;
  double sum = 0;
  for (int i = 0; i < k; ++i) {
    const std::uint32_t code = qweight[(i * bits / 32) * n + column] >> (i * bits % 32) & mask;
    const std::uint32_t zero =
        (qzeros[i / group * (n * bits / 32) + column * bits / 32] >> (column * bits % 32) & mask) +
        1;
    sum += (static_cast<int>(code) - static_cast<int>(zero)) *
           static_cast<double>(__half2float(scales[i / group * n + column])) *
           static_cast<double>(float(x[i]));
  }
  y[static_cast<std::size_t>(row) * n + column] = sum;
}

double activated64(Activation activation, double g, double u) {
  switch (activation) {
    case Activation::kGelu:
      return 0.5 * g * (1 + std::erf(g / std::sqrt(2.0))) * u;
    case Activation::kGeluTanh:
      return 0.5 * g * (1 + std::tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))) * u;
    case Activation::kClampedSwiglu: {
      const double a = std::min(g, 7.0);
      const double b = std::clamp(u, -7.0, 7.0);
      return (b + 1) * a / (1 + std::exp(-1.702 * a));
    }
    case Activation::kSilu:
      break;
  }
  return g / (1 + std::exp(-g)) * u;
}

template <class T>
class Check {
 public:
  explicit Check(const Case& of) : c_(of), limits_(device_limits(0)), scratch_(limits_) {
    arch_ = &choose_arch("sm90", limits_.capability);
    const auto size = [](std::int64_t a, std::int64_t b) {
      return static_cast<std::size_t>(a * b);
    };
    const int groups = c_.k / c_.group;
    const std::size_t weights = size(c_.k * c_.bits / 32, c_.n);
    const std::size_t zeros = size(groups, c_.n * c_.bits / 32);
    const std::size_t scales = size(groups, c_.n);
    const auto experts = static_cast<std::size_t>(c_.experts);
    qweight_.resize(experts * weights);
    for (std::size_t i = 0; i < qweight_.size(); ++i)
      qweight_[i] = static_cast<std::uint32_t>(mix(i));
    qzeros_.assign(experts * zeros, c_.bits == 4 ? 0x77777777u : 0x7f7f7f7fu);
    if (!c_.symmetric) {
      for (std::size_t i = 0; i < qzeros_.size(); ++i) {
        qzeros_[i] ^=
            static_cast<std::uint32_t>(mix(i + 7)) & (c_.bits == 4 ? 0x33333333u : 0x0f0f0f0fu);
      }
    }
    const int scale = c_.bits == 4 ? 0x2000 : 0x1000;
    scales_.resize(experts * scales);
    for (std::size_t i = 0; i < scales_.size(); ++i)
      scales_[i] = static_cast<std::uint16_t>(static_cast<unsigned>(scale) + mix(i + 3) % 0x800);
    bias_.resize(experts * static_cast<std::size_t>(c_.n));
    for (std::size_t i = 0; i < bias_.size(); ++i)
      bias_[i] = static_cast<float>(mix(i + 11) % 1000) / 500.0F - 1.0F;
    std::vector<GptqTensors> tensors;
    for (std::size_t e = 0; e < experts; ++e) {
      GptqModule layer;
      layer.name = "check";
      const auto tensor = [](const void* data, std::size_t bytes, DType dtype, std::int64_t a,
                             std::int64_t b,
                             int rank) { return HostTensor{data, bytes, dtype, {a, b}, rank}; };
      layer.qweight =
          tensor(&qweight_[e * weights], weights * 4, DType::kInt32, c_.k * c_.bits / 32, c_.n, 2);
      layer.qzeros =
          tensor(&qzeros_[e * zeros], zeros * 4, DType::kInt32, groups, c_.n * c_.bits / 32, 2);
      layer.scales = tensor(&scales_[e * scales], scales * 2, DType::kFloat16, groups, c_.n, 2);
      if (c_.bias) {
        layer.bias = tensor(&bias_[e * static_cast<std::size_t>(c_.n)],
                            static_cast<std::size_t>(c_.n) * 4, DType::kFloat32, c_.n, 0, 1);
      }
      tensors.emplace_back(layer);
    }
    const GptqSpec spec{.bits = c_.bits, .group_size = c_.group, .zero_points = ZeroPoints::kV1};
    LayersToLoad layers(tensors, spec);
    Uploader uploader(0);
    LayerUpload layer_upload(uploader, layers);
    weight_ = arch_->pack(layers, layer_upload);
    weight_.ready.wait();
  }

  /// Whether all is right.
  bool run() {
    const auto ids = static_cast<std::size_t>(c_.tokens * c_.top_k);
    std::vector<std::int32_t> routing = route(c_.routing, c_.tokens, c_.top_k, c_.experts);
    if (std::strcmp(c_.routing, "uniform") == 0) {
      // Expert 2 has no tokens, expert 3 a few, and some ids have no expert.
      for (std::size_t i = 0; i < ids; ++i) {
        if (routing[i] == 2 || (routing[i] == 3 && i % 16 != 0))
          routing[i] = i % 3 == 0 ? -1 : c_.experts > 4 ? 4 : 1;
      }
    }
    const CudaBuffer routing_device = upload(routing);
    CudaBuffer x(0, DType::kFloat16, static_cast<std::int64_t>(ids) * c_.k);
    fill_normal<<<256, 256>>>(static_cast<T*>(x.data()), ids * static_cast<std::size_t>(c_.k));
    const int outputs = c_.activates ? c_.n / 2 : c_.n;
    const bool single = c_.f32;
    CudaBuffer y(0, single ? DType::kFloat32 : DType::kFloat16,
                 static_cast<std::int64_t>(ids) * outputs);
    std::vector<float> token_weights(ids);
    for (std::size_t i = 0; i < ids; ++i)
      token_weights[i] = static_cast<float>(mix(i + 99) % 1000) / 1000.0F + 0.1F;
    const CudaBuffer weights_device = upload(token_weights);
    const Segment& segment = weight_.segments[0];
    ExpertProblem problem{
        .matrix = {.weight = segment.view,
                   .x = x.data(),
                   .x_type = sizeof(T) == 2 && std::is_same_v<T, __half> ? FloatType::kF16
                                                                         : FloatType::kBF16,
                   .x_stride = c_.k,
                   .x_columns = c_.k,
                   .y = y.data(),
                   .y_type = single                      ? FloatType::kF32
                             : std::is_same_v<T, __half> ? FloatType::kF16
                                                         : FloatType::kBF16,
                   .y_stride = outputs},
        .expert_bytes = weight_.expert_bytes,
        .num_experts = c_.experts,
        .top_k = c_.top_k,
        .activates = c_.activates,
        .activation = c_.activation};
    if (c_.weighs > 0) {
      problem.weights = static_cast<const float*>(weights_device.data());
      problem.weights_stride = c_.top_k;
      problem.weights_bias = c_.weighs == 1;
    }
    // Of each row of y: the expert, the row of x, the id; -2: the row is not written.
    std::vector<std::int32_t> expert_of(ids, -2), x_row_of(ids, 0), id_of(ids, 0);
    std::vector<ExpertRows> dispatches;
    CudaBuffer lists;
    const TopkIds topk{.data = routing_device.data(),
                       .row_stride = c_.top_k,
                       .tokens = c_.tokens,
                       .top_k = c_.top_k};
    if (std::strcmp(c_.lists, "dispatched") == 0) {
      int row = 0;
      for (const int rows : {1, 40, 0, 129, 64, 65}) {
        const int expert = (row * 7 + 1) % c_.experts;
        if (rows == 0) continue;
        const int input = row / 2;
        dispatches.push_back({expert, input, row, rows});
        for (int i = 0; i < rows; ++i, ++row) {
          expert_of[static_cast<std::size_t>(row)] = expert;
          x_row_of[static_cast<std::size_t>(row)] = input + i;
        }
      }
      problem.dispatches = dispatches;
      problem.top_k = 1;
      problem.weights = nullptr;
    } else if (std::strcmp(c_.lists, "sorted") == 0) {
      const std::int64_t tiles =
          most_expert_tiles(static_cast<std::int64_t>(ids), c_.experts, c_.tile_rows);
      lists = CudaBuffer(0, DType::kInt32, static_cast<std::int64_t>(ids) + 3 * tiles + 1);
      auto* list = static_cast<std::int32_t*>(lists.data());
      const ExpertTiles sorted{.ids = list,
                               .experts = list + ids,
                               .first = list + ids + tiles,
                               .rows = list + static_cast<std::int64_t>(ids) + 2 * tiles,
                               .count = list + static_cast<std::int64_t>(ids) + 3 * tiles};
      sort_by_expert(topk, c_.experts, c_.tile_rows, sorted, false, nullptr);
      problem.tiles = {.experts = sorted.experts,
                       .ids = sorted.ids,
                       .first = sorted.first,
                       .rows = sorted.rows,
                       .used = sorted.count,
                       .tile_rows = c_.tile_rows,
                       .most_tiles = static_cast<std::int32_t>(tiles),
                       .most_slots = static_cast<std::int64_t>(ids),
                       .num_ids = static_cast<std::int32_t>(ids)};
      problem.y_by_slot = true;
      std::vector<std::int32_t> order(ids);
      MARLINQ_CUDA_CHECK(cudaMemcpy(order.data(), sorted.ids, ids * 4, cudaMemcpyDeviceToHost));
      std::size_t slots = 0;
      for (const std::int32_t e : routing) slots += e >= 0 ? 1 : 0;
      for (std::size_t slot = 0; slot < slots; ++slot) {
        const auto id = static_cast<std::size_t>(order[slot]);
        expert_of[slot] = routing[id];
        x_row_of[slot] = order[slot] / c_.top_k;
        id_of[slot] = order[slot];
      }
    } else {
      const std::int64_t room =
          round_up(static_cast<std::int64_t>(ids), c_.tile_rows) + (c_.experts + 1) * c_.tile_rows;
      lists = CudaBuffer(0, DType::kInt32, room + room / c_.tile_rows + 1);
      auto* list = static_cast<std::int32_t*>(lists.data());
      const AlignedTiles aligned{.sorted_token_ids = list,
                                 .sorted_size = room,
                                 .expert_ids = list + room,
                                 .expert_size = room / c_.tile_rows,
                                 .num_tokens_past_padded = list + room + room / c_.tile_rows};
      align_block_size(topk, c_.tile_rows, c_.experts, {}, aligned, false, nullptr);
      if (c_.turned) {
        std::vector<std::int32_t> slots(static_cast<std::size_t>(room));
        MARLINQ_CUDA_CHECK(
            cudaMemcpy(slots.data(), list, slots.size() * 4, cudaMemcpyDeviceToHost));
        for (std::size_t i = 0; i < slots.size(); i += static_cast<std::size_t>(c_.tile_rows)) {
          std::reverse(slots.begin() + static_cast<std::ptrdiff_t>(i),
                       slots.begin() + static_cast<std::ptrdiff_t>(i) + c_.tile_rows);
        }
        MARLINQ_CUDA_CHECK(
            cudaMemcpy(list, slots.data(), slots.size() * 4, cudaMemcpyHostToDevice));
      }
      problem.tiles = {.experts = aligned.expert_ids,
                       .ids = aligned.sorted_token_ids,
                       .used = aligned.num_tokens_past_padded,
                       .tile_rows = c_.tile_rows,
                       .most_tiles = static_cast<std::int32_t>(room / c_.tile_rows),
                       .most_slots = room,
                       .num_ids = static_cast<std::int32_t>(ids)};
      for (std::size_t id = 0; id < ids; ++id) {
        expert_of[id] = routing[id];
        x_row_of[id] = static_cast<std::int32_t>(id) / c_.top_k;
        id_of[id] = static_cast<std::int32_t>(id);
      }
    }
    const std::vector<double> expected = expect(expert_of, x_row_of, id_of, token_weights, x, ids);
    bool right = true;
    for (int index = 0; index < kKernels; ++index) {
      if (index == kStrips && c_.activates) continue;
      ExpertPlan plan = plan_of(index, problem, limits_);
      if (plan.shared_bytes > limits_.shared_bytes - 512) {
        std::printf("%s,%d,does not fit\n", c_.name, index);
        continue;
      }
      for (const int share : {0, 1, 2, 32}) {
        plan.share = share;
        plan.dependent_launch = false;
        right &= compare(problem, plan, y, expected, expert_of, index, outputs, single);
      }
    }
    return right;
  }

 private:
  std::vector<double> expect(const std::vector<std::int32_t>& expert_of,
                             const std::vector<std::int32_t>& x_row_of,
                             const std::vector<std::int32_t>& id_of,
                             const std::vector<float>& token_weights, const CudaBuffer& x,
                             std::size_t rows) {
    const CudaBuffer qweight = upload(qweight_), qzeros = upload(qzeros_), scales = upload(scales_);
    const CudaBuffer experts = upload(expert_of), x_rows = upload(x_row_of);
    const auto n = static_cast<std::size_t>(c_.n);
    std::vector<double> sums(rows * n);
    const CudaBuffer sums_device = upload(sums);
    product64<T>
        <<<dim3(static_cast<unsigned>(ceil_div(c_.n, 128)), static_cast<unsigned>(rows)), 128>>>(
            static_cast<const std::uint32_t*>(qweight.data()),
            static_cast<const std::uint32_t*>(qzeros.data()),
            static_cast<const __half*>(scales.data()), static_cast<const T*>(x.data()),
            static_cast<const int*>(experts.data()), static_cast<const int*>(x_rows.data()),
            static_cast<double*>(const_cast<void*>(sums_device.data())), c_.n, c_.k, c_.bits,
            c_.group);
    MARLINQ_CUDA_CHECK(
        cudaMemcpy(sums.data(), sums_device.data(), sums.size() * 8, cudaMemcpyDeviceToHost));
    const std::size_t outputs = c_.activates ? n / 2 : n;
    std::vector<double> y(rows * outputs);
    for (std::size_t r = 0; r < rows; ++r) {
      if (expert_of[r] < 0) continue;
      const double weight = token_weights[static_cast<std::size_t>(id_of[r])];
      for (std::size_t f = 0; f < n; ++f) {
        double& sum = sums[r * n + f];
        if (c_.weighs == 2) sum *= weight;
        if (c_.bias) sum += bias_[static_cast<std::size_t>(expert_of[r]) * n + f];
        if (c_.weighs == 1) sum *= weight;
      }
      for (std::size_t f = 0; f < outputs; ++f) {
        y[r * outputs + f] =
            c_.activates ? activated64(c_.activation, sums[r * n + f], sums[r * n + outputs + f])
                         : sums[r * n + f];
      }
    }
    return y;
  }

  bool compare(const ExpertProblem& problem, const ExpertPlan& plan, const CudaBuffer& y,
               const std::vector<double>& expected, const std::vector<std::int32_t>& expert_of,
               int index, int outputs, bool single) {
    const std::size_t count = expected.size();
    std::vector<unsigned char> bytes(count * (single ? 4 : 2)), again(bytes.size());
    for (std::vector<unsigned char>* result : {&bytes, &again}) {
      MARLINQ_CUDA_CHECK(cudaMemset(const_cast<void*>(y.data()), 0xff, bytes.size()));
      sm90::launch_experts(problem, plan, limits_, scratch_.view(), nullptr);
      MARLINQ_CUDA_CHECK(
          cudaMemcpy(result->data(), y.data(), bytes.size(), cudaMemcpyDeviceToHost));
    }
    double error = 0, norm = 0, most = 0;
    std::size_t strays = 0;
    for (std::size_t i = 0; i < count; ++i) {
      const std::int32_t expert = expert_of[i / static_cast<std::size_t>(outputs)];
      double value = 0;
      if (single) {
        float f;
        std::memcpy(&f, &bytes[i * 4], 4);
        value = static_cast<double>(f);
      } else {
        T t;
        std::memcpy(&t, &bytes[i * 2], 2);
        value = static_cast<double>(float(t));
      }
      if (expert == -2) {
        strays += std::isnan(value) ? 0 : 1;
        continue;
      }
      const double d = value - expected[i];
      error += d * d;
      norm += expected[i] * expected[i];
      if (!(std::abs(d) <= most)) most = std::abs(d);
    }
    const double relative = std::sqrt(error / norm);
    const double bound = std::is_same_v<T, __half> ? 4e-4 : 3e-3;
    const bool right = relative < bound && strays == 0 && bytes == again;
    std::printf("%s,%d,share %d,%.2e,most %.2e%s%s%s\n", c_.name, index, plan.share, relative, most,
                relative < bound ? "" : ",WRONG", strays > 0 ? ",STRAYS" : "",
                bytes == again ? "" : ",NOT THE SAME");
    std::fflush(stdout);
    return right;
  }

  Case c_;
  DeviceLimits limits_;
  Scratch scratch_;
  const ArchKernels* arch_ = nullptr;
  DeviceWeight weight_;
  std::vector<std::uint32_t> qweight_, qzeros_;
  std::vector<std::uint16_t> scales_;
  std::vector<float> bias_;
};

template <class T>
bool check_all() {
  const Case cases[] = {
      {.name = "plain"},
      {.name = "64 rows", .tile_rows = 64},
      {.name = "16 rows", .tile_rows = 16},
      {.name = "asymmetric", .symmetric = false},
      {.name = "group 64", .symmetric = false, .group = 64},
      {.name = "group 32", .group = 32},
      {.name = "group 32, odd", .symmetric = false, .group = 32, .tokens = 77, .n = 200, .k = 448},
      {.name = "group 32, silu", .group = 32, .activates = true, .tokens = 500},
      {.name = "one group", .group = 768},
      {.name = "8 bits", .bits = 8, .symmetric = false},
      {.name = "silu", .activates = true},
      {.name = "gelu, bias, weights",
       .bias = true,
       .activates = true,
       .activation = Activation::kGelu,
       .weighs = 2,
       .tile_rows = 64},
      {.name = "gelu tanh", .activates = true, .activation = Activation::kGeluTanh},
      {.name = "clamped",
       .bias = true,
       .activates = true,
       .activation = Activation::kClampedSwiglu,
       .n = 640},
      {.name = "f32", .f32 = true, .tile_rows = 64},
      {.name = "weights, bias", .bias = true, .weighs = 1},
      {.name = "weights, then bias", .bias = true, .f32 = true, .weighs = 2},
      {.name = "aligned", .lists = "aligned"},
      {.name = "aligned 16", .lists = "aligned", .tile_rows = 16, .experts = 3},
      {.name = "aligned 48, silu", .activates = true, .lists = "aligned", .tile_rows = 48},
      {.name = "aligned 64",
       .lists = "aligned",
       .tile_rows = 64,
       .tokens = 700,
       .n = 256,
       .experts = 4},
      {.name = "aligned 8, 20 experts", .lists = "aligned", .tile_rows = 8, .experts = 20},
      {.name = "aligned 48, turned",
       .lists = "aligned",
       .turned = true,
       .tile_rows = 48,
       .tokens = 700,
       .n = 384,
       .experts = 9},
      {.name = "aligned 16, turned, long",
       .lists = "aligned",
       .turned = true,
       .tile_rows = 16,
       .tokens = 90,
       .n = 256,
       .k = 4096},
      {.name = "aligned 16, one",
       .lists = "aligned",
       .routing = "one",
       .tile_rows = 16,
       .tokens = 900,
       .n = 256,
       .k = 256},
      {.name = "aligned 32", .bias = true, .f32 = true, .lists = "aligned", .tile_rows = 32},
      {.name = "dispatched", .lists = "dispatched"},
      {.name = "one", .routing = "one", .tokens = 500},
      {.name = "one, silu", .group = 64, .activates = true, .routing = "one", .tokens = 500},
      {.name = "odd", .group = 64, .tokens = 77, .n = 200, .k = 448},
      {.name = "one token", .tokens = 1, .experts = 60},
      {.name = "long", .tokens = 40, .n = 256, .k = 8192},
  };
  bool right = true;
  for (const Case& c : cases) right &= Check<T>(c).run();
  return right;
}

// --- times ---

struct Model {
  const char* name;
  int experts, top_k, hidden, inner;
};
constexpr Model kModels[] = {{"qwen3-30b-a3b", 128, 8, 2048, 768},
                             {"mixtral-8x7b", 8, 2, 4096, 14336},
                             {"deepseek-v3", 256, 8, 7168, 2048},
                             {"qwen2-moe", 60, 4, 2048, 1408},
                             {"v2-lite", 64, 6, 2048, 1408}};

// As many launches as take some 5 ms.
template <class F>
double time_some(cudaStream_t stream, F&& run) {
  const double us = time_us(stream, 2, 1, run);
  return time_us(stream, std::clamp(static_cast<int>(5000 / us), 3, 200), 5, run);
}

class Bench {
 public:
  Bench(const Model& model, std::string routing, int bits, int group)
      : model_(model),
        routing_(std::move(routing)),
        bits_(bits),
        group_(group),
        limits_(device_limits(0)),
        scratch_(limits_),
        up_(make_stack(2 * model.inner, model.hidden)),
        down_(make_stack(model.hidden, model.inner)),
        sums_(0, DType::kInt32, 4) {
    MARLINQ_CUDA_CHECK(cudaStreamCreate(&stream_));
  }

  void run(int tokens) {
    const std::vector<std::int32_t> chosen = route(routing_, tokens, model_.top_k, model_.experts);
    const std::int64_t ids = std::int64_t{tokens} * model_.top_k;
    ids_ = upload(chosen);
    tokens_ = tokens;
    topk_ = {
        .data = ids_.data(), .row_stride = model_.top_k, .tokens = tokens_, .top_k = model_.top_k};
    x_ = CudaBuffer(0, DType::kFloat16, std::int64_t{tokens} * model_.hidden);
    hidden_ = CudaBuffer(0, DType::kFloat16, ids * 2 * model_.inner);
    hidden_before_ = CudaBuffer(0, DType::kFloat16, ids * 2 * model_.inner);
    y_ = CudaBuffer(0, DType::kFloat32, ids * model_.hidden);
    y_before_ = CudaBuffer(0, DType::kFloat32, ids * model_.hidden);
    out_ = CudaBuffer(0, DType::kFloat16, std::int64_t{tokens} * model_.hidden);
    weights_ = upload(std::vector<float>(static_cast<std::size_t>(ids), 0.125F));
    for (CudaBuffer* buffer : {&hidden_, &hidden_before_, &y_, &y_before_}) {
      MARLINQ_CUDA_CHECK(cudaMemset(
          buffer->data(), 0,
          static_cast<std::size_t>(buffer->size()) * (buffer->dtype() == DType::kFloat32 ? 4 : 2)));
    }
    fill_normal<<<1024, 256, 0, stream_>>>(static_cast<__half*>(x_.data()),
                                           static_cast<std::size_t>(x_.size()));
    const double average = static_cast<double>(ids) / model_.experts;
    if (!products) {
      measure(sm80::tile_rows(tokens, ids, model_.experts, BatchInvariance::kNotRequired), kSm80);
      std::swap(hidden_, hidden_before_);
      std::swap(y_, y_before_);
      compares_ = true;
    }
    for (const int rows : {16, 32, 64, 80, 144}) {
      if (products && aligned) break;
      if (average * 8 < rows || average > rows * 5) continue;
      if (!only_rows.empty() &&
          std::find(only_rows.begin(), only_rows.end(), rows) == only_rows.end())
        continue;
      for (int i = 0; i < kStrips; ++i) {
        const int of =
            sm90::expert_kernels(FloatType::kF16, 4).tiles[static_cast<std::size_t>(i)].tokens;
        if (of < rows || of > 3 * rows) continue;
        if (takes(i)) measure(rows, i);
      }
    }
    // As a block does it.
    if (!products)
      measure(sm90::tile_rows(tokens, ids, model_.experts, BatchInvariance::kNotRequired), kChosen);
    compares_ = false;
    if (!aligned) return;
    for (const int rows : {8, 16, 32, 48, 64}) {
      const bool likely = average * 2 >= rows && average <= rows * 8;
      const bool asked = std::find(only_rows.begin(), only_rows.end(), rows) != only_rows.end();
      if (only_rows.empty() ? !likely : !asked) continue;
      measure_aligned(rows, kSm80);
      measure_aligned(rows, kChosen);
      for (int i = 0; i < kKernels; ++i) {
        if (takes(i) && (i != kStrips || rows <= 16)) measure_aligned(rows, i);
      }
    }
  }

 private:
  bool takes(int kernel) const {
    return only_kernels.empty() ||
           std::find(only_kernels.begin(), only_kernels.end(), kernel) != only_kernels.end();
  }

  static constexpr int kChosen = -2;
  static constexpr int kSm80 = -1;

  struct Stack {
    CudaBuffer memory;
    std::vector<WeightView> copies;
    std::int64_t expert_bytes;
  };

  Stack make_stack(int n, int k) const {
    sm80::Layout layout{.code_bits = bits_, .scale_bytes = 2, .has_zeros = false, .n = n};
    layout.chunks = k / 64;
    layout.groups = ceil_div(k, group_);
    const std::int64_t chunk_groups_place = layout.words() * 4 + layout.group_bytes();
    const std::int64_t expert = round_up(chunk_groups_place + layout.chunks * 4, 256);
    const std::int32_t step_shift = std::countr_zero(static_cast<std::uint32_t>(group_ / 16));
    const auto copies = static_cast<int>(
        std::clamp(170e6 / (model_.experts * static_cast<double>(expert)) + 1, 1.0, 4.0));
    Stack stack{.memory = CudaBuffer(0, DType::kInt32, copies * model_.experts * expert / 4),
                .copies = {},
                .expert_bytes = expert};
    fill_experts<<<1024, 256>>>(static_cast<std::uint32_t*>(stack.memory.data()),
                                stack.memory.size(), expert / 4, layout.words());
    // As layout.hpp says, for groups that are shorter than a chunk.
    const int chunk_groups = std::max(64 / group_, 1);
    std::vector<std::int32_t> words;
    for (int i = 0; i < copies * model_.experts; ++i) {
      for (int chunk = 0; chunk < layout.chunks; ++chunk) {
        words.push_back(chunk * chunk_groups << 4);
        for (int step = 4 / chunk_groups; step < 4; step += 4 / chunk_groups)
          words.back() |= 1 << step;
      }
    }
    const auto width = static_cast<std::size_t>(layout.chunks) * 4;
    MARLINQ_CUDA_CHECK(cudaDeviceSynchronize());
    MARLINQ_CUDA_CHECK(
        cudaMemcpy2D(static_cast<unsigned char*>(stack.memory.data()) + chunk_groups_place,
                     static_cast<std::size_t>(expert), words.data(), width, width,
                     static_cast<std::size_t>(copies * model_.experts), cudaMemcpyHostToDevice));
    for (int copy = 0; copy < copies; ++copy) {
      const auto* memory =
          static_cast<const unsigned char*>(stack.memory.data()) + copy * model_.experts * expert;
      stack.copies.push_back(
          {.codes = reinterpret_cast<const std::uint32_t*>(memory),
           .groups = memory + layout.words() * 4,
           .chunk_groups = reinterpret_cast<const std::int32_t*>(memory + chunk_groups_place),
           .chunk_shift = std::max(step_shift - 2, -1),
           .step_shift = step_shift,
           .code_bits = bits_,
           .middle = 1 << (bits_ - 1),
           .record_bytes = layout.record_bytes(),
           .n = n,
           .k = k,
           .chunks = static_cast<std::int32_t>(layout.chunks),
           .num_groups = static_cast<std::int32_t>(layout.groups),
           .groups_per_chunk = chunk_groups});
    }
    return stack;
  }

  void sort(int rows) {
    const std::int64_t ids = ids_.size();
    const std::int64_t tiles = most_expert_tiles(ids, model_.experts, rows);
    lists_ = CudaBuffer(0, DType::kInt32, ids + 3 * tiles + 1);
    auto* list = static_cast<std::int32_t*>(lists_.data());
    sorted_ = {.ids = list,
               .experts = list + ids,
               .first = list + ids + tiles,
               .rows = list + ids + 2 * tiles,
               .count = list + ids + 3 * tiles};
    tiles_ = {.experts = sorted_.experts,
              .ids = sorted_.ids,
              .first = sorted_.first,
              .rows = sorted_.rows,
              .used = sorted_.count,
              .tile_rows = rows,
              .most_tiles = static_cast<std::int32_t>(tiles),
              .most_slots = ids,
              .num_ids = static_cast<std::int32_t>(ids)};
    run_sort(rows);
  }
  void run_sort(int rows) const {
    sort_by_expert(topk_, model_.experts, rows, sorted_, true, stream_);
  }

  ExpertProblem problem_of(const Stack& stack, int copy, bool up) const {
    const WeightView& w = stack.copies[static_cast<std::size_t>(copy) % stack.copies.size()];
    return {.matrix = {.weight = w,
                       .x = up ? x_.data() : hidden_.data(),
                       .x_stride = w.k,
                       .x_columns = w.k,
                       .y = up ? const_cast<void*>(hidden_.data()) : const_cast<void*>(y_.data()),
                       .y_type = up ? FloatType::kF16 : FloatType::kF32,
                       .y_stride = up ? w.n / 2 : w.n},
            .expert_bytes = stack.expert_bytes,
            .num_experts = model_.experts,
            .tiles = tiles_,
            .top_k = up ? model_.top_k : 1,
            .x_by_slot = !up,
            .y_by_slot = up,
            .activates = up};
  }

  // By a kernel of sm90, or one that is chosen: by sm90 or by sm80.
  void measure(int rows, int kernel) {
    sort(rows);
    const auto launch = [&](int i, bool up, FloatType type, bool settled, int share) {
      ExpertProblem problem = problem_of(up ? up_ : down_, i, up);
      problem.matrix.y_type = type;
      problem.tiles.settled = problem.follows_product = settled;
      ExpertPlan plan =
          kernel == kChosen ? sm90::plan_experts(problem, limits_, BatchInvariance::kNotRequired)
          : kernel == kSm80 ? sm80::plan_experts(problem, limits_, BatchInvariance::kNotRequired)
                            : plan_of(kernel, problem, limits_);
      plan.share = share;
      sm90::launch_experts(problem, plan, limits_, scratch_.view(), stream_);
    };
    const auto print = [&](const char* step, int share, double value) {
      std::printf("%s,%s,%d,%d,%d,%s,%d,%.4g\n", model_.name, routing_.c_str(), tokens_, rows,
                  kernel, step, share, value);
      std::fflush(stdout);
    };
    const auto time = [&](auto&& run) { return time_some(stream_, run); };
    for (const int share : shares) {
      if (share > 0 && kernel == kSm80) continue;
      print("up", share, time([&](int i) { launch(i, true, FloatType::kF16, false, share); }));
      print("down", share, time([&](int i) { launch(i, false, FloatType::kF16, false, share); }));
      if (share > 0 || products) continue;
      print("down f32", 0, time([&](int i) { launch(i, false, FloatType::kF32, false, share); }));
    }
    if (products) return;
    const auto sum_of = [&](FloatType type) {
      return CombineProblem{.expert_output = {y_.data(), type, model_.hidden},
                            .topk_ids = topk_,
                            .num_experts = model_.experts,
                            .topk_weights = static_cast<const float*>(weights_.data()),
                            .topk_weights_stride = model_.top_k,
                            .out = {out_.data(), FloatType::kF16, model_.hidden},
                            .hidden = model_.hidden};
    };
    print("sort", 0, time([&](int) { run_sort(rows); }));
    for (const FloatType type : {FloatType::kF32, FloatType::kF16}) {
      const bool half = type == FloatType::kF16;
      const CombineProblem sum = sum_of(type);
      print(half ? "combine" : "combine f32", 0,
            time([&](int) { combine(sum, limits_, true, stream_); }));
      print(half ? "block" : "block f32", 0, time([&](int i) {
              run_sort(rows);
              launch(i, true, FloatType::kF16, false, 0);
              launch(i, false, type, true, 0);
              combine(sum, limits_, true, stream_);
            }));
    }
    launch(0, true, FloatType::kF16, false, 0);
    launch(0, false, FloatType::kF32, false, 0);
    if (!compares_) return;
    print("difference of up", 0, difference<__half>(hidden_, hidden_before_));
    print("difference of down", 0, difference<float>(y_, y_before_));
  }

  // Products of the tiles of moe_align_block_size, whose rows are ids.
  void measure_aligned(int rows, int kernel) {
    const std::int64_t ids = ids_.size();
    const std::int64_t room = round_up(ids, rows) + (model_.experts + 1) * std::int64_t{rows};
    lists_ = CudaBuffer(0, DType::kInt32, room + room / rows + 1);
    auto* list = static_cast<std::int32_t*>(lists_.data());
    align_block_size(topk_, rows, model_.experts, {},
                     {.sorted_token_ids = list,
                      .sorted_size = room,
                      .expert_ids = list + room,
                      .expert_size = room / rows,
                      .num_tokens_past_padded = list + room + room / rows},
                     false, stream_);
    tiles_ = {.experts = list + room,
              .ids = list,
              .used = list + room + room / rows,
              .tile_rows = rows,
              .most_tiles = static_cast<std::int32_t>(room / rows),
              .most_slots = room,
              .num_ids = static_cast<std::int32_t>(ids)};
    for (const int share : shares) {
      if (share > 0 && kernel == kSm80) continue;
      for (const bool up : {true, false}) {
        const double us = time_some(stream_, [&](int i) {
          ExpertProblem problem = problem_of(up ? up_ : down_, i, up);
          problem.x_by_slot = problem.y_by_slot = false;
          problem.matrix.y_type = FloatType::kF16;
          problem.activates = false;
          problem.matrix.y_stride = problem.matrix.weight.n;
          ExpertPlan plan =
              kernel == kSm80 ? sm80::plan_experts(problem, limits_, BatchInvariance::kNotRequired)
              : kernel == kChosen
                  ? sm90::plan_experts(problem, limits_, BatchInvariance::kNotRequired)
                  : plan_of(kernel, problem, limits_);
          plan.share = share;
          sm90::launch_experts(problem, plan, limits_, scratch_.view(), stream_);
        });
        std::printf("%s,%s,%d,%d,%d,%s,%d,%.4g\n", model_.name, routing_.c_str(), tokens_, rows,
                    kernel, up ? "aligned up" : "aligned down", share, us);
        std::fflush(stdout);
      }
    }
  }

  template <class T>
  double difference(const CudaBuffer& y, const CudaBuffer& expected) {
    MARLINQ_CUDA_CHECK(cudaMemset(sums_.data(), 0, 16));
    add_difference<<<1024, 256>>>(
        static_cast<const T*>(y.data()), static_cast<const T*>(expected.data()),
        static_cast<std::size_t>(y.size()), static_cast<double*>(sums_.data()));
    double sums[2];
    MARLINQ_CUDA_CHECK(cudaMemcpy(sums, sums_.data(), 16, cudaMemcpyDeviceToHost));
    return std::sqrt(sums[0] / sums[1]);
  }

  Model model_;
  std::string routing_;
  int bits_;
  int group_;  // a power of two, 16 or more
  DeviceLimits limits_;
  Scratch scratch_;
  Stack up_, down_;
  cudaStream_t stream_ = nullptr;
  CudaBuffer x_, hidden_, hidden_before_, y_, y_before_, out_, weights_, ids_, lists_, sums_;
  int tokens_ = 0;
  bool compares_ = false;

 public:
  std::vector<int> shares = {0};
  std::vector<int> only_rows;     // of tiles; empty: all
  std::vector<int> only_kernels;  // the same
  bool products = false;          // only
  bool aligned = false;

 private:
  ExpertTiles sorted_ = {};
  TopkIds topk_ = {};
  TokenTileLists tiles_;
};

}  // namespace

int main(int argc, char** argv) try {
  if (argc > 1 && std::strcmp(argv[1], "check") == 0) {
    const bool half = check_all<__half>();
    const bool bfloat16 = check_all<__nv_bfloat16>();
    return half && bfloat16 ? 0 : 1;
  }
  const char* routing = argc > 1 ? argv[1] : "uniform";
  const char* only = argc > 2 ? argv[2] : "";
  std::vector<int> tokens;
  std::vector<int> shares = {0}, rows, kernels;
  bool aligned = false, products = false;
  int bits = 4, group = 128;
  for (int i = 3; i < argc; ++i) {
    int share = 0;
    if (std::sscanf(argv[i], "share=%d", &share) == 1) {
      shares.push_back(share);
    } else if (std::sscanf(argv[i], "rows=%d", &share) == 1) {
      rows.push_back(share);
    } else if (std::sscanf(argv[i], "kernel=%d", &share) == 1) {
      kernels.push_back(share);
    } else if (std::sscanf(argv[i], "bits=%d", &share) == 1) {
      bits = share;
    } else if (std::sscanf(argv[i], "group=%d", &share) == 1) {
      group = share;
    } else if (std::strcmp(argv[i], "products") == 0) {
      products = true;
    } else if (std::strcmp(argv[i], "aligned") == 0) {
      aligned = true;
    } else {
      tokens.push_back(std::atoi(argv[i]));
    }
  }
  if (tokens.empty()) tokens = {64, 256, 1024, 4096};
  std::printf("model,routing,tokens,tile_rows,kernel,step,share,us\n");
  for (const Model& model : kModels) {
    if (std::strncmp(model.name, only, std::strlen(only)) != 0) continue;
    Bench bench(model, routing, bits, group);
    bench.shares = shares;
    bench.only_rows = rows;
    bench.only_kernels = kernels;
    bench.aligned = aligned;
    bench.products = products;
    for (const int t : tokens) bench.run(t);
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
