// How fast layers and stacks of experts are loaded onto GPU 0, and how much of its memory that takes: one
// line of JSON for each set of layers, kind of host memory and number of loading threads. The bandwidth of the bus is
// measured in the same run.
// Usage: load_layers [part of the names of sets]
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "cuda/cuda_check.hpp"
#include "cuda/device_memory.hpp"
#include "marlinq/cuda/cuda_backend.hpp"

namespace {

using namespace marlinq;
using test::DeviceMemory;

constexpr int kBits = 4;
constexpr std::int64_t kGroupSize = 128;
constexpr int kRounds = 4;  // the first with new contexts

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Resident pageable memory, which can be pinned where it is.
class Arena {
 public:
  explicit Arena(std::size_t bytes) : bytes_(bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    (void)madvise(memory, bytes, MADV_HUGEPAGE);
    memory_ = static_cast<unsigned char*>(memory);
    std::vector<std::thread> threads;
    const std::size_t count = std::max(1U, std::thread::hardware_concurrency());
    for (std::size_t t = 0; t < count; ++t) {
      threads.emplace_back(
          [this, t, count] { fill(bytes_ * t / count, bytes_ * (t + 1) / count); });
    }
    for (std::thread& thread : threads) thread.join();
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    if (pinned_) (void)cudaHostUnregister(memory_);
    munmap(memory_, bytes_);
  }

  void pin() {
    MARLINQ_CUDA_CHECK(cudaHostRegister(memory_, bytes_, cudaHostRegisterDefault));
    pinned_ = true;
  }
  unsigned char* take(std::size_t bytes) {
    unsigned char* at = memory_ + used_;
    used_ += (bytes + 63) / 64 * 64;
    return at;
  }

 private:
  void fill(std::size_t begin, std::size_t end) {
    std::uint64_t state = begin;
    for (std::size_t at = (begin + 7) / 8 * 8; at + 8 <= end; at += 8) {
      state += 0x9E3779B97F4A7C15ULL;
      const std::uint64_t mixed = (state ^ (state >> 31)) * 0xBF58476D1CE4E5B9ULL;
      std::memcpy(memory_ + at, &mixed, 8);
    }
  }

  std::size_t bytes_;
  std::size_t used_ = 0;
  unsigned char* memory_ = nullptr;
  bool pinned_ = false;
};

struct Shape {
  std::int64_t n;
  std::int64_t k;

  std::int64_t groups() const { return k / kGroupSize; }
  std::size_t qweight() const { return static_cast<std::size_t>(k * n / 2); }
  std::size_t scales() const { return static_cast<std::size_t>(groups() * n * 2); }
  std::size_t qzeros() const { return static_cast<std::size_t>(groups() * n / 2); }
  std::size_t raw() const { return qweight() + scales() + qzeros(); }
  std::size_t bytes() const { return raw() + static_cast<std::size_t>(k) * 4 + 256; }
};

struct Set {
  std::string name;
  std::vector<Shape> shapes;  // of one layer; of modules that are fused where there are experts
  int layers = 32;
  bool act_order = false;
  int experts = 0;  // of a stack
};

GptqModule make_module(const Shape& shape, bool act_order, Arena& arena) {
  GptqModule m;
  m.name = std::to_string(shape.n) + "x" + std::to_string(shape.k);
  m.qweight = {
      arena.take(shape.qweight()), shape.qweight(), DType::kInt32, {shape.k / 8, shape.n}, 2};
  auto* scales = reinterpret_cast<std::uint16_t*>(arena.take(shape.scales()));
  for (std::size_t i = 0; i < shape.scales() / 2; ++i) {  // 0.008 to 0.016
    scales[i] = static_cast<std::uint16_t>(0x2000 | (scales[i] & 0x3FF));
  }
  m.scales = {scales, shape.scales(), DType::kFloat16, {shape.groups(), shape.n}, 2};
  unsigned char* qzeros = arena.take(shape.qzeros());
  std::memset(qzeros, 0x77, shape.qzeros());
  m.qzeros = {qzeros, shape.qzeros(), DType::kInt32, {shape.groups(), shape.n / 8}, 2};
  auto* g_idx = reinterpret_cast<std::int32_t*>(arena.take(static_cast<std::size_t>(shape.k) * 4));
  for (std::int64_t row = 0; row < shape.k; ++row) {
    const std::int64_t place = act_order ? row * 7919 % shape.k : row;  // a prime
    g_idx[row] = static_cast<std::int32_t>(place / kGroupSize);
  }
  m.g_idx = {g_idx, static_cast<std::size_t>(shape.k) * 4, DType::kInt32, {shape.k, 0}, 1};
  return m;
}

// One load: a layer, or the experts of a stack.
struct Load {
  std::vector<GptqTensors> tensors;
  bool stacked = false;
};

std::vector<Load> make_loads(const Set& set, Arena& arena) {
  std::vector<Load> loads;
  for (int i = 0; i < set.layers; ++i) {
    if (set.experts == 0) {
      for (const Shape& shape : set.shapes) {
        loads.push_back({.tensors = {GptqTensors(make_module(shape, set.act_order, arena))}});
      }
      continue;
    }
    Load& stack = loads.emplace_back(Load{.tensors = {}, .stacked = true});
    for (int e = 0; e < set.experts; ++e) {
      GptqTensors& expert = stack.tensors.emplace_back();
      for (const Shape& shape : set.shapes) {
        expert.modules.push_back(make_module(shape, set.act_order, arena));
      }
    }
  }
  return loads;
}

// GB/s of large copies from pinned memory.
double bus_bandwidth() {
  constexpr std::size_t kBytes = std::size_t{512} << 20;
  void* host = nullptr;
  MARLINQ_CUDA_CHECK(cudaHostAlloc(&host, kBytes, cudaHostAllocDefault));
  double best = 0;
  {
    const cuda::CudaBuffer device(0, DType::kInt32, kBytes / 4);
    for (int round = 0; round < 6; ++round) {
      MARLINQ_CUDA_CHECK(cudaDeviceSynchronize());
      const auto start = std::chrono::steady_clock::now();
      MARLINQ_CUDA_CHECK(
          cudaMemcpyAsync(device.data(), host, kBytes, cudaMemcpyHostToDevice, nullptr));
      MARLINQ_CUDA_CHECK(cudaDeviceSynchronize());
      best = std::max(best, static_cast<double>(kBytes) / seconds_since(start) / 1e9);
    }
  }
  MARLINQ_CUDA_CHECK(cudaFreeHost(host));
  return best;
}

struct Loading {
  double seconds = 0;
  std::int64_t packed = 0;  // bytes
  std::int64_t peak = 0;    // more than before
};

// Loads all layers, dealt out to the contexts, a thread each.
Loading load_all(const std::vector<Load>& layers,
                 const std::vector<std::unique_ptr<CudaBackend::Context>>& contexts) {
  using Linears = std::vector<std::unique_ptr<Linear<CudaBackend>>>;
  using Stacks = std::vector<std::shared_ptr<MarlinExpertStack<CudaBackend>>>;
  std::vector<Linears> loaded(contexts.size());
  std::vector<Stacks> stacks(contexts.size());
  std::vector<std::exception_ptr> errors(contexts.size());
  const std::int64_t before = DeviceMemory::bytes();
  DeviceMemory::forget_peak();
  Loading result;
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < contexts.size(); ++t) {
    threads.emplace_back([&, t] {
      try {
        for (std::size_t i = t; i < layers.size(); i += contexts.size()) {
          const GptqSpec spec{.bits = kBits, .group_size = kGroupSize};
          if (layers[i].stacked) {
            stacks[t].push_back(
                CudaBackend::load_gptq_stacked(*contexts[t], layers[i].tensors, spec, {}));
          } else {
            loaded[t].push_back(
                CudaBackend::load_gptq(*contexts[t], layers[i].tensors.front(), spec, {}));
          }
        }
      } catch (...) {
        errors[t] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  MARLINQ_CUDA_CHECK(cudaDeviceSynchronize());
  result.seconds = seconds_since(start);
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
  result.peak = DeviceMemory::peak() - before;
  for (const Linears& linears : loaded) {
    for (const auto& linear : linears) result.packed += linear->describe().packed_bytes;
  }
  for (const Stacks& some : stacks) {
    for (const auto& stack : some) result.packed += stack->describe().packed_bytes;
  }
  return result;
}

void run(const Set& set, const std::vector<Load>& layers, double bytes, const char* source,
         double bandwidth) {
  std::size_t largest = 0;
  for (const Shape& shape : set.shapes) largest = std::max(largest, shape.raw());
  for (const int threads : {1, 2, 4}) {
    std::vector<std::unique_ptr<CudaBackend::Context>> contexts;
    for (int t = 0; t < threads; ++t) contexts.push_back(std::make_unique<CudaBackend::Context>(0));
    double first = 0;
    double best = 0;
    Loading loading;
    std::int64_t peak = 0;
    for (int round = 0; round < kRounds; ++round) {
      loading = load_all(layers, contexts);
      const double speed = bytes / loading.seconds / 1e9;
      if (round == 0) {
        first = speed;
        peak = loading.peak;  // with what the contexts took for loading
      }
      best = std::max(best, speed);
    }
    std::printf(
        "{\"set\": \"%s\", \"source\": \"%s\", \"threads\": %d, \"gb\": %.3f, \"gb_per_s\": %.1f, "
        "\"share\": %.3f, \"first_gb_per_s\": %.1f, \"first_share\": %.3f, \"packed_mb\": %.1f, "
        "\"peak_over_packed_mb\": %.1f, \"largest_raw_mb\": %.1f}\n",
        set.name.c_str(), source, threads, bytes / 1e9, best, best / bandwidth, first,
        first / bandwidth, static_cast<double>(loading.packed) / 1e6,
        static_cast<double>(peak - loading.packed) / 1e6, static_cast<double>(largest) / 1e6);
    std::fflush(stdout);
  }
}

void measure(const Set& set, double bandwidth) {
  std::size_t layer_bytes = 0;
  std::size_t layer_raw = 0;
  for (const Shape& shape : set.shapes) {
    layer_bytes += shape.bytes();
    layer_raw += shape.raw();
  }
  const auto count =
      static_cast<std::size_t>(set.layers) * static_cast<std::size_t>(std::max(1, set.experts));
  Arena arena(layer_bytes * count);
  const std::vector<Load> layers = make_loads(set, arena);
  const auto bytes = static_cast<double>(layer_raw * count);
  run(set, layers, bytes, "pageable", bandwidth);
  arena.pin();
  run(set, layers, bytes, "pinned", bandwidth);
}

int measure_all(const std::string& filter) {
  const auto start = std::chrono::steady_clock::now();
  const std::vector<Set> sets = {
      {.name = "32 x 4096x4096", .shapes = {{4096, 4096}}},
      {.name = "32 x 4096x4096 act-order", .shapes = {{4096, 4096}}, .act_order = true},
      {.name = "Llama-3-8B", .shapes = {{6144, 4096}, {4096, 4096}, {28672, 4096}, {4096, 14336}}},
      {.name = "4 layers of 70B", .shapes = {{57344, 8192}, {8192, 28672}}, .layers = 4},
      {.name = "4 layers of 70B act-order",
       .shapes = {{57344, 8192}, {8192, 28672}},
       .layers = 4,
       .act_order = true},
      {.name = "Qwen3-30B-A3B gate and up",
       .shapes = {{768, 2048}, {768, 2048}},
       .layers = 8,
       .experts = 128},
      {.name = "Qwen3-30B-A3B down", .shapes = {{2048, 768}}, .layers = 8, .experts = 128},
  };
  cudaDeviceProp properties{};
  MARLINQ_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
  const double bandwidth = bus_bandwidth();
  std::printf("{\"device\": \"%s\", \"cores\": %u, \"bus_gb_per_s\": %.1f}\n", properties.name,
              std::thread::hardware_concurrency(), bandwidth);
  for (const Set& set : sets) {
    if (set.name.find(filter) != std::string::npos) measure(set, bandwidth);
  }
  std::printf("{\"seconds\": %.1f}\n", seconds_since(start));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return measure_all(argc > 1 ? argv[1] : "");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "load_layers: %s\n", error.what());
    return 1;
  }
}
