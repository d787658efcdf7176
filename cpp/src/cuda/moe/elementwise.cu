#include <algorithm>
#include <cstdint>

#include "core/integers.hpp"
#include "cuda/launch.hpp"
#include "cuda/moe/activation.cuh"
#include "cuda/moe/columns.cuh"
#include "cuda/moe/elementwise.hpp"
#include "cuda/ptx/launch.cuh"
#include "marlinq/routing.hpp"

namespace marlinq::cuda {
namespace {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFU;
constexpr std::int64_t kMostRows = 65535;  // of a grid's second dimension

std::int64_t size_of(FloatType type) noexcept { return type == FloatType::kF32 ? 4 : 2; }

/// Whether rows begin at multiples of 16 bytes.
template <class Matrix>
bool aligned(const Matrix& matrix, std::int64_t rows) noexcept {
  const auto address = reinterpret_cast<std::uintptr_t>(matrix.data);
  return address % 16 == 0 && (rows <= 1 || matrix.row_stride * size_of(matrix.type) % 16 == 0);
}

// --- activate ---

constexpr int kActivateThreads = 256;

template <Activation kActivation, class In, class Out>
__device__ __forceinline__ void activate_columns(const Columns<In>& gate, const Columns<In>& up,
                                                 Out* row, int32_t first, int32_t count,
                                                 bool aligned_rows) {
  float values[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    values[i] = activated<kActivation>(to_float(gate.values[i]), to_float(up.values[i]));
  }
  store_columns(values, row, first, count, aligned_rows);
}

template <class In, class Out>
__global__ void __launch_bounds__(kActivateThreads)
    activate_rows(const ActivateProblem problem, bool in_aligned, bool out_aligned) {
  ptx::launch_dependents();
  ptx::wait_for_predecessor();
  const auto first = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x) * kColumns;
  if (first >= problem.inner) return;
  for (int32_t row = blockIdx.y; row < problem.rows; row += gridDim.y) {
    const In* const in =
        static_cast<const In*>(problem.gate_up.data) + row * problem.gate_up.row_stride;
    Out* const out = static_cast<Out*>(problem.hidden.data) + row * problem.hidden.row_stride;
    const Columns<In> gate = load_columns(in, first, problem.inner, in_aligned);
    const Columns<In> up = load_columns(in + problem.inner, first, problem.inner, in_aligned);
    switch (problem.activation) {
      case Activation::kSilu:
        activate_columns<Activation::kSilu>(gate, up, out, first, problem.inner, out_aligned);
        break;
      case Activation::kGelu:
        activate_columns<Activation::kGelu>(gate, up, out, first, problem.inner, out_aligned);
        break;
      case Activation::kGeluTanh:
        activate_columns<Activation::kGeluTanh>(gate, up, out, first, problem.inner, out_aligned);
        break;
      case Activation::kClampedSwiglu:
        activate_columns<Activation::kClampedSwiglu>(gate, up, out, first, problem.inner,
                                                     out_aligned);
        break;
    }
  }
}

// --- combine ---

constexpr int kCombineThreads = 128;
constexpr int kReadsAtOnce = 8;  // of 16 bytes, by a thread

/// Which of the optional 16-byte accesses a launch may use.
struct Alignments {
  bool expert_output = false;
  bool shared = false;
  bool gate = false;
  bool x = false;
  bool residual = false;
  bool out = false;
};

/// x . gate over a row, the same in every thread. By all threads of the block.
__device__ __forceinline__ float dot_with_gate(const CombineProblem& problem, int64_t token,
                                               const Alignments& aligned) {
  __shared__ float warp_sums[kCombineThreads / kLanes];
  float sum = 0.0F;
  with_type(problem.x.type, [&](auto example) {
    using T = decltype(example);
    const T* const x = static_cast<const T*>(problem.x.data) + token * problem.x.row_stride;
    for (int32_t first = threadIdx.x * kColumns; first < problem.hidden;
         first += kCombineThreads * kColumns) {
      const Columns<T> values = load_columns(x, first, problem.hidden, aligned.x);
      const Columns<float> gates =
          load_columns(problem.shared_gate, first, problem.hidden, aligned.gate);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        sum = fmaf(to_float(values.values[i]), gates.values[i], sum);
      }
    }
  });
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (threadIdx.x % kLanes == 0) warp_sums[threadIdx.x / kLanes] = sum;
  __syncthreads();
  sum = 0.0F;
#pragma unroll
  for (int warp = 0; warp < kCombineThreads / kLanes; ++warp) sum += warp_sums[warp];
  return sum;
}

/// sums += factor * columns of a row of a matrix of any type.
template <int kCount>
__device__ __forceinline__ void add_columns(float (&sums)[kCount], float factor,
                                            const FloatMatrix& matrix, int64_t row, int32_t first,
                                            int32_t count, bool aligned) {
  with_type(matrix.type, [&](auto example) {
    using T = decltype(example);
    const T* const data = static_cast<const T*>(matrix.data) + row * matrix.row_stride;
    const Columns<T, kCount> columns = load_columns<kCount>(data, first, count, aligned);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      sums[i] = fmaf(factor, to_float(columns.values[i]), sums[i]);
    }
  });
}

/// 16 bytes of a row that nothing else reads.
template <class T, int kCount = 16 / sizeof(T)>
__device__ __forceinline__ Columns<T, kCount> load_once(const T* row, int32_t first, int32_t count,
                                                        bool aligned) {
  if (!aligned || first + kCount > count) return load_columns<kCount>(row, first, count, false);
  Columns<T, kCount> columns;
  *reinterpret_cast<uint4*>(columns.values) = __ldcs(reinterpret_cast<const uint4*>(row + first));
  return columns;
}

/// A block takes one token, and a share of its columns. Threads read pieces of kSlots rows at a time.
template <class Expert, int kSlots>
__global__ void __launch_bounds__(kCombineThreads)
    combine_rows(const CombineProblem problem, const Alignments aligned) {
  constexpr int kCount = 16 / sizeof(Expert);
  constexpr int kPieces = kReadsAtOnce / kSlots;
  constexpr int32_t kStep = kCombineThreads * kCount;
  ptx::launch_dependents();
  if (!problem.settled) ptx::wait_for_predecessor();
  const int64_t token = blockIdx.x;
  const int32_t top_k = problem.topk_ids.top_k;
  const int lane = threadIdx.x % kLanes;
  // Of slot `lane`.
  bool here = false;
  float lane_weight = 1.0F;
  if (lane < top_k) {
    const int64_t place = token * problem.topk_ids.row_stride + lane;
    const int64_t id = problem.topk_ids.wide
                           ? static_cast<const int64_t*>(problem.topk_ids.data)[place]
                           : static_cast<const int32_t*>(problem.topk_ids.data)[place];
    here = id >= 0 && id < problem.num_experts;
    if (problem.topk_weights != nullptr) {
      lane_weight = problem.topk_weights[token * problem.topk_weights_stride + lane];
    }
  }
  const unsigned present = __ballot_sync(kAllLanes, here);  // a bit each slot
  if (problem.settled) ptx::wait_for_predecessor();
  float shared_factor = 1.0F;
  if (problem.shared.data != nullptr && problem.shared_gate != nullptr) {
    shared_factor = sigmoid(dot_with_gate(problem, token, aligned));
  }
  const Expert* const experts = static_cast<const Expert*>(problem.expert_output.data) +
                                token * top_k * problem.expert_output.row_stride;
#pragma unroll 1
  for (auto begin = static_cast<int32_t>(blockIdx.y * (kStep * kPieces)); begin < problem.hidden;
       begin += static_cast<int32_t>(gridDim.y * (kStep * kPieces))) {
    const int32_t first = begin + static_cast<int32_t>(threadIdx.x) * kCount;
    float sums[kPieces][kCount] = {};
    for (int32_t slot = 0; slot < top_k; slot += kSlots) {
      Columns<Expert, kCount> rows[kSlots][kPieces];
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        if ((present >> (slot + i) & 1U) == 0) continue;
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          rows[i][piece] = load_once(experts + (slot + i) * problem.expert_output.row_stride,
                                     first + piece * kStep, problem.hidden, aligned.expert_output);
        }
      }
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        if ((present >> (slot + i) & 1U) == 0) continue;
        const float weight = __shfl_sync(kAllLanes, lane_weight, slot + i);
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
            sums[piece][j] = fmaf(weight, to_float(rows[i][piece].values[j]), sums[piece][j]);
          }
        }
      }
    }
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int32_t column = first + piece * kStep;
      if (column >= problem.hidden) break;
      if (problem.shared.data != nullptr) {
        add_columns(sums[piece], shared_factor, problem.shared, token, column, problem.hidden,
                    aligned.shared);
      }
      if (problem.residual.data != nullptr) {
        add_columns(sums[piece], 1.0F, problem.residual, token, column, problem.hidden,
                    aligned.residual);
      }
      with_type(problem.out.type, [&](auto example) {
        using T = decltype(example);
        store_columns(sums[piece],
                      static_cast<T*>(problem.out.data) + token * problem.out.row_stride, column,
                      problem.hidden, aligned.out);
      });
    }
  }
}

template <class Expert, int kSlots>
void launch_combine(const CombineProblem& problem, const Alignments& alignments,
                    const DeviceLimits& limits, bool dependent, void* stream) {
  constexpr int kBlockColumns = kCombineThreads * kReadsAtOnce / kSlots * 16 / sizeof(Expert);
  const std::int64_t tokens = problem.topk_ids.tokens;
  std::int64_t shares = ceil_div(problem.hidden, kBlockColumns);
  if (problem.shared_gate != nullptr) {
    // Each share of a token needs all of its product with the gate: so few shares, but some for each
    // multiprocessor.
    constexpr std::int64_t kBlocksEach = 4;
    shares = std::clamp<std::int64_t>(limits.multiprocessors * kBlocksEach / tokens, 1, shares);
  }
  const dim3 grid(static_cast<unsigned>(tokens), static_cast<unsigned>(shares));
  launch_kernel(combine_rows<Expert, kSlots>, grid, kCombineThreads, 0, dependent,
                static_cast<cudaStream_t>(stream), problem, alignments);
}

template <class In>
void launch_activate(const ActivateProblem& problem, bool dependent, void* stream) {
  // The half with u has to begin at 16 bytes too.
  const bool in_aligned = aligned(problem.gate_up, problem.rows) &&
                          problem.inner * size_of(problem.gate_up.type) % 16 == 0;
  const bool out_aligned = aligned(problem.hidden, problem.rows);
  const std::int64_t needed = ceil_div(problem.inner, kColumns);
  const auto threads =
      static_cast<int>(std::min<std::int64_t>(round_up(needed, kLanes), kActivateThreads));
  const dim3 grid(static_cast<unsigned>(ceil_div(needed, threads)),
                  static_cast<unsigned>(std::min<std::int64_t>(problem.rows, kMostRows)));
  auto* const kernel = problem.hidden.type == FloatType::kBF16 ? activate_rows<In, __nv_bfloat16>
                                                               : activate_rows<In, __half>;
  launch_kernel(kernel, grid, threads, 0, dependent, static_cast<cudaStream_t>(stream), problem,
                in_aligned, out_aligned);
}

}  // namespace

void activate(const ActivateProblem& problem, bool dependent_launch, void* stream) {
  if (problem.rows == 0 || problem.inner == 0) return;
  switch (problem.gate_up.type) {
    case FloatType::kF32:
      return launch_activate<float>(problem, dependent_launch, stream);
    case FloatType::kF16:
      return launch_activate<__half>(problem, dependent_launch, stream);
    case FloatType::kBF16:
      return launch_activate<__nv_bfloat16>(problem, dependent_launch, stream);
  }
}

void combine(const CombineProblem& problem, const DeviceLimits& limits, bool dependent_launch,
             void* stream) {
  const std::int64_t tokens = problem.topk_ids.tokens;
  if (tokens == 0 || problem.hidden == 0) return;
  const Alignments alignments{
      .expert_output = aligned(problem.expert_output, tokens * problem.topk_ids.top_k),
      .shared = aligned(problem.shared, tokens),
      .gate = aligned(FloatMatrix{.data = problem.shared_gate}, 1),
      .x = aligned(problem.x, tokens),
      .residual = aligned(problem.residual, tokens),
      .out = aligned(problem.out, tokens)};
  const auto launch = [&](auto* launch_it) {
    launch_it(problem, alignments, limits, dependent_launch, stream);
  };
  // The kernel with room for eight slots is the shortest, and few blocks are bound by nothing but their start.
  constexpr std::int64_t kFewBlocks = 8;  // on a multiprocessor
  const bool few =
      tokens * ceil_div(problem.hidden, kCombineThreads * 4) <= limits.multiprocessors * kFewBlocks;
  const std::int32_t top_k = few ? kMaxTopK : problem.topk_ids.top_k;
  switch (problem.expert_output.type) {
    case FloatType::kF32:
      return launch(top_k <= 2   ? launch_combine<float, 2>
                    : top_k <= 4 ? launch_combine<float, 4>
                                 : launch_combine<float, 8>);
    case FloatType::kF16:
      return launch(launch_combine<__half, 8>);
    case FloatType::kBF16:
      return launch(launch_combine<__nv_bfloat16, 8>);
  }
}

}  // namespace marlinq::cuda
