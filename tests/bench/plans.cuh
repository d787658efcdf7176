// Times every schedule of a GPU architecture's products on one GPU, and "auto" and "invariant", which plan() would
// take, and checks each against float64 first: one line of CSV a plan, with its time in us and its error.
// The cost models of plan() are fitted to these lines.
//
// Usage: <program> [fp16 | bf16] [8] [asym] [group=128] [NxK ...] [m=1,16,...] [only=begin of names]
//                  [sustain=ms]
//
// From some 256 tokens on the power limit sets the clock: what a plan takes in a burst says little about what it takes
// in a row. With sustain each plan runs for so long, its time is that of the second half, and a column more tells the
// clock in MHz that it left.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/arch_table.hpp"
#include "cuda/context.hpp"
#include "cuda/cuda_check.hpp"
#include "cuda/layers_to_load.hpp"
#include "marlinq/gptq.hpp"
#include "replay.cuh"

namespace marlinq::bench {

using namespace marlinq::cuda;

struct Shape {
  int n, k;
};

inline std::uint64_t next_random(std::uint64_t& state) {
  state += 0x9E3779B97F4A7C15ULL;
  std::uint64_t z = state;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return z ^ (z >> 31);
}

__device__ inline float normal_like(std::uint64_t i) {
  float sum = 0;
  for (int j = 0; j < 4; ++j) {
    std::uint64_t z = (i * 4 + j + 1) * 0x9E3779B97F4A7C15ULL;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    sum += static_cast<float>((z ^ (z >> 31)) >> 40) * 0x1p-24f - 0.5f;
  }
  return sum * 1.732f;
}

template <class T>
__global__ void fill(T* x, std::size_t count) {
  for (std::size_t i = blockIdx.x * 256 + threadIdx.x; i < count; i += gridDim.x * 256)
    x[i] = T(normal_like(i));
}

// Rows row_of(j) = j * step of the product, in float64.
template <class T>
__global__ void reference(const std::uint32_t* qweight, const std::uint32_t* qzeros,
                          const __half* scales, const T* x, double* y, int n, int k, int bits,
                          int group_size, int rows, int step) {
  const int column = blockIdx.x * 128 + threadIdx.x;
  if (column >= n) return;
  double sum[16] = {};
  const std::uint32_t mask = (1u << bits) - 1;
  for (int i = 0; i < k; ++i) {
    const std::uint32_t code =
        qweight[static_cast<std::size_t>(i * bits / 32) * n + column] >> (i * bits % 32) & mask;
    const int group = i / group_size;
    const std::uint32_t zero =
        (qzeros[static_cast<std::size_t>(group) * (n * bits / 32) + column * bits / 32] >>
             (column * bits % 32) &
         mask) +
        1;
    const double w =
        (static_cast<int>(code) - static_cast<int>(zero)) *
        static_cast<double>(__half2float(scales[static_cast<std::size_t>(group) * n + column]));
    for (int j = 0; j < rows; ++j)
      sum[j] += w * static_cast<double>(float(x[static_cast<std::size_t>(j) * step * k + i]));
  }
  for (int j = 0; j < rows; ++j) y[static_cast<std::size_t>(j) * n + column] = sum[j];
}

template <class T>
__global__ void difference(const T* y, const double* expected, double* sums, int n, int rows,
                           int step) {
  double error = 0, norm = 0;
  for (std::size_t i = blockIdx.x * 256 + threadIdx.x; i < static_cast<std::size_t>(rows) * n;
       i += gridDim.x * 256) {
    const std::size_t row = i / n;
    const double d = static_cast<double>(float(y[row * step * n + i % n])) - expected[i];
    error += d * d;
    norm += expected[i] * expected[i];
  }
  atomicAdd(sums, error);
  atomicAdd(sums + 1, norm);
}

/// Clocks of a multiprocessor and nanoseconds, some 20 us apart.
__global__ void probe_clock(unsigned long long* elapsed) {
  const auto now = [] {
    unsigned long long ns = 0;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
    return ns;
  };
  const unsigned long long begin = now();
  const long long clocks = clock64();
  while (now() - begin < 20000) {
  }
  elapsed[0] = static_cast<unsigned long long>(clock64() - clocks);
  elapsed[1] = now() - begin;
}

template <class T>
class Bench {
 public:
  Bench(const char* arch, Shape shape, int bits, bool symmetric, int group_size)
      : shape_(shape), bits_(bits), group_size_(group_size) {
    MARLINQ_CUDA_CHECK(cudaStreamCreate(&stream_));
    limits_ = device_limits(0);
    arch_ = &choose_arch(arch, limits_.capability);
    const int groups = shape.k / group_size;
    std::uint64_t state = 1;
    std::vector<std::uint32_t> qweight(static_cast<std::size_t>(shape.k) * bits / 32 * shape.n);
    for (auto& word : qweight) word = static_cast<std::uint32_t>(next_random(state));
    std::vector<std::uint32_t> qzeros(static_cast<std::size_t>(groups) * shape.n * bits / 32,
                                      bits == 4 ? 0x77777777u : 0x7f7f7f7fu);
    if (!symmetric) {
      for (auto& word : qzeros) {
        word ^= static_cast<std::uint32_t>(next_random(state)) &
                (bits == 4 ? 0x33333333u : 0x0f0f0f0fu);
      }
    }
    std::vector<std::uint16_t> scales(static_cast<std::size_t>(groups) * shape.n);
    for (auto& scale : scales)
      scale = static_cast<std::uint16_t>(0x1c00 + next_random(state) % 0x800);
    GptqModule layer;
    layer.name = "bench";
    const auto tensor = [](const void* data, std::size_t bytes, DType dtype, std::int64_t a,
                           std::int64_t b) { return HostTensor{data, bytes, dtype, {a, b}, 2}; };
    layer.qweight =
        tensor(qweight.data(), qweight.size() * 4, DType::kInt32, shape.k * bits / 32, shape.n);
    layer.qzeros =
        tensor(qzeros.data(), qzeros.size() * 4, DType::kInt32, groups, shape.n * bits / 32);
    layer.scales = tensor(scales.data(), scales.size() * 2, DType::kFloat16, groups, shape.n);
    const GptqTensors tensors(layer);
    const GptqSpec spec{.bits = bits, .group_size = group_size};
    LayersToLoad layers({&tensors, 1}, spec);
    Uploader uploader(0);
    LayerUpload layer_upload(uploader, layers);
    weight_ = arch_->pack(layers, layer_upload);
    weight_.ready.wait();
    qweight_ = upload(qweight);
    qzeros_ = upload(qzeros);
    scales_ = upload(scales);
    const std::size_t bytes = static_cast<std::size_t>(weight_.memory.size()) * 4;
    copies_.push_back(weight_.segments[0].view);
    std::size_t total = bytes;
    while (total < (std::size_t{170} << 20)) {
      memories_.emplace_back(0, DType::kInt32, weight_.memory.size());
      auto* base = static_cast<unsigned char*>(memories_.back().data());
      MARLINQ_CUDA_CHECK(cudaMemcpy(base, weight_.memory.data(), bytes, cudaMemcpyDeviceToDevice));
      WeightView view = copies_[0];
      const auto move = [&](auto*& pointer) {
        using P = std::remove_reference_t<decltype(pointer)>;
        if (pointer == nullptr) return;
        pointer =
            reinterpret_cast<P>(base + (reinterpret_cast<const unsigned char*>(pointer) -
                                        static_cast<const unsigned char*>(weight_.memory.data())));
      };
      move(view.codes);
      move(view.groups);
      move(view.chunk_groups);
      copies_.push_back(view);
      total += bytes;
    }
    std::int64_t floats = 0;
    std::int32_t flags = 0;
    for (const ArchKernels* arch : arch_kernels()) {
      std::int64_t need_floats = 0;
      std::int32_t need_flags = 0;
      arch->scratch_need(limits_, need_floats, need_flags);
      floats = std::max(floats, need_floats);
      flags = std::max(flags, need_flags);
    }
    partials_ = CudaBuffer(0, DType::kFloat32, floats);
    flags_ = CudaBuffer(0, DType::kInt32, flags);
    MARLINQ_CUDA_CHECK(cudaMemset(flags_.data(), 0, static_cast<std::size_t>(flags) * 4));
    MARLINQ_CUDA_CHECK(cudaMalloc(&sums_, 16));
    MARLINQ_CUDA_CHECK(cudaMalloc(&expected_, sizeof(double) * 16 * shape.n));
  }

  void run(int m, const char* type) {
    T* x = nullptr;
    T* y = nullptr;
    MARLINQ_CUDA_CHECK(cudaMalloc(&x, sizeof(T) * m * shape_.k));
    MARLINQ_CUDA_CHECK(cudaMalloc(&y, sizeof(T) * m * shape_.n));
    fill<<<1024, 256, 0, stream_>>>(x, static_cast<std::size_t>(m) * shape_.k);
    GemmProblem problem{.weight = copies_[0],
                        .x = x,
                        .x_type = std::is_same_v<T, __half> ? FloatType::kF16 : FloatType::kBF16,
                        .x_stride = shape_.k,
                        .x_columns = shape_.k,
                        .y = y,
                        .y_type = std::is_same_v<T, __half> ? FloatType::kF16 : FloatType::kBF16,
                        .y_stride = shape_.n,
                        .m = m};
    rows_ = std::min(m, 16);
    step_ = rows_ > 1 ? (m - 1) / (rows_ - 1) : 1;
    reference<<<(shape_.n + 127) / 128, 128, 0, stream_>>>(
        qweight_, qzeros_, reinterpret_cast<const __half*>(scales_), x, expected_, shape_.n,
        shape_.k, bits_, group_size_, rows_, step_);
    measure(problem, arch_->plan(problem, limits_, BatchInvariance::kNotRequired), "auto", type);
    measure(problem, arch_->plan(problem, limits_, BatchInvariance::kRequired), "invariant", type);
    for (const Schedule& schedule : arch_->schedules(problem, limits_)) {
      measure(problem, arch_->plan_as(problem, limits_, schedule), to_string(schedule).c_str(),
              type);
    }
    MARLINQ_CUDA_CHECK(cudaStreamSynchronize(stream_));
    cudaFree(x);
    cudaFree(y);
  }

 private:
  template <class V>
  std::uint32_t* upload(const std::vector<V>& values) {
    void* target = nullptr;
    MARLINQ_CUDA_CHECK(cudaMalloc(&target, values.size() * sizeof(V)));
    MARLINQ_CUDA_CHECK(
        cudaMemcpy(target, values.data(), values.size() * sizeof(V), cudaMemcpyHostToDevice));
    return static_cast<std::uint32_t*>(target);
  }

  void measure(GemmProblem problem, GemmPlan plan, const char* name, const char* type) {
    if (std::strncmp(name, only.c_str(), only.size()) != 0) return;
    plan.dependent_launch = true;
    const SplitScratch scratch{static_cast<float*>(partials_.data()),
                               static_cast<std::uint32_t*>(flags_.data())};
    const std::size_t y_bytes = sizeof(T) * problem.m * shape_.n;
    MARLINQ_CUDA_CHECK(cudaMemsetAsync(problem.y, 0xff, y_bytes, stream_));
    MARLINQ_CUDA_CHECK(cudaMemsetAsync(sums_, 0, 16, stream_));
    arch_->launch(problem, plan, scratch, stream_);
    difference<<<256, 256, 0, stream_>>>(static_cast<const T*>(problem.y), expected_, sums_,
                                         shape_.n, rows_, step_);
    double sums[2];
    MARLINQ_CUDA_CHECK(cudaMemcpyAsync(sums, sums_, 16, cudaMemcpyDeviceToHost, stream_));
    MARLINQ_CUDA_CHECK(cudaStreamSynchronize(stream_));
    const double error = std::sqrt(sums[0] / sums[1]);

    const double flops = 2.0 * problem.m * shape_.n * shape_.k;
    const double guess = std::max(5e-6, flops / 3e14);
    const double replay = sustain_ms > 0 ? 6e-3 : 1.5e-3;  // so that the host's part in it is small
    const int launches = std::clamp(static_cast<int>(replay / guess), 2, 400);
    const auto run_once = [&](int) {
      problem.weight = copies_[next_copy_];
      next_copy_ = (next_copy_ + 1) % copies_.size();
      arch_->launch(problem, plan, scratch, stream_);
    };
    double us = time_us(stream_, launches, guess > 2e-3 ? 1 : 4, run_once);
    if (sustain_ms > 0) {
      const int replays = std::max(static_cast<int>(sustain_ms * 1e3 / (us * launches)), 1);
      us = time_us(stream_, launches, replays, replays / 2, run_once);
    }
    char clock[32] = "";
    if (sustain_ms > 0) std::snprintf(clock, sizeof clock, ",%.0f", clock_mhz());
    std::printf("%dx%d,%s,%d,%s,%.2f,%.2e%s%s\n", shape_.n, shape_.k, type, problem.m, name, us,
                error, clock,
                error < 6e-4 || (sizeof(T) == 2 && !std::is_same_v<T, __half> && error < 3.2e-3)
                    ? ""
                    : ",WRONG");
    std::fflush(stdout);
  }

  double clock_mhz() const {
    auto* const elapsed = reinterpret_cast<unsigned long long*>(sums_);
    probe_clock<<<1, 1, 0, stream_>>>(elapsed);
    unsigned long long values[2];
    MARLINQ_CUDA_CHECK(
        cudaMemcpyAsync(values, elapsed, sizeof values, cudaMemcpyDeviceToHost, stream_));
    MARLINQ_CUDA_CHECK(cudaStreamSynchronize(stream_));
    return 1e3 * static_cast<double>(values[0]) / static_cast<double>(values[1]);
  }

  const ArchKernels* arch_ = nullptr;
  Shape shape_;
  int bits_, group_size_;

 public:
  std::string only;  // begin of the names of what is measured
  int sustain_ms = 0;

 private:
  cudaStream_t stream_ = nullptr;
  DeviceLimits limits_;
  DeviceWeight weight_;
  std::vector<CudaBuffer> memories_;
  std::vector<WeightView> copies_;
  std::size_t next_copy_ = 0;
  std::uint32_t *qweight_ = nullptr, *qzeros_ = nullptr, *scales_ = nullptr;
  CudaBuffer partials_, flags_;
  double* sums_ = nullptr;
  double* expected_ = nullptr;
  int rows_ = 0, step_ = 1;
};

inline int run_plans(int argc, char** argv, const char* arch) {
  bool half = true, symmetric = true;
  int bits = 4, group_size = 128, sustain_ms = 0;
  std::vector<Shape> shapes;
  std::string only;
  std::vector<int> ms = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192};
  for (int i = 1; i < argc; ++i) {
    const std::string a = argv[i];
    int n = 0, k = 0;
    if (a == "bf16") half = false;
    if (a == "asym") symmetric = false;
    if (a == "8") bits = 8;
    if (a.rfind("group=", 0) == 0) group_size = std::atoi(a.c_str() + 6);
    if (std::sscanf(a.c_str(), "%dx%d", &n, &k) == 2) shapes.push_back({n, k});
    if (a.rfind("sustain=", 0) == 0) sustain_ms = std::atoi(a.c_str() + 8);
    if (a.rfind("only=", 0) == 0) only = a.substr(5);
    if (a.rfind("m=", 0) == 0) {
      ms.clear();
      for (const char* p = a.c_str() + 2; *p != 0;) {
        ms.push_back(std::atoi(p));
        p = std::strchr(p, ',');
        if (p == nullptr) break;
        ++p;
      }
    }
  }
  if (shapes.empty()) {
    shapes = {{4096, 4096},  {6144, 4096},  {28672, 4096}, {4096, 14336},
              {10240, 8192}, {57344, 8192}, {8192, 28672}};
  }
  try {
    const std::string type = std::string(half ? "fp16" : "bf16") + (bits == 8 ? " w8" : "") +
                             (symmetric ? "" : " asym") +
                             (group_size == 128 ? "" : " g" + std::to_string(group_size));
    for (const Shape shape : shapes) {
      if (half) {
        Bench<__half> bench(arch, shape, bits, symmetric, group_size);
        bench.only = only;
        bench.sustain_ms = sustain_ms;
        for (const int m : ms) bench.run(m, type.c_str());
      } else {
        Bench<__nv_bfloat16> bench(arch, shape, bits, symmetric, group_size);
        bench.only = only;
        bench.sustain_ms = sustain_ms;
        for (const int m : ms) bench.run(m, type.c_str());
      }
    }
  } catch (const marlinq::Error& error) {
    std::printf("error: %s\n", error.what());
    return 1;
  }
  return 0;
}

}  // namespace marlinq::bench
