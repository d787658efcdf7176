#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cstdint>

#include "core/integers.hpp"
#include "cuda/launch.hpp"
#include "cuda/moe/route.hpp"
#include "cuda/ptx/launch.cuh"

namespace marlinq::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 4;  // of a block, a token each
constexpr int kPiece = 4;  // neighbouring logits of a lane
constexpr int kPieceOfWarp = kLanes * kPiece;
constexpr unsigned kAllLanes = 0xFFFFFFFFU;

/// Keys order the experts as their scores do. Above these are those of numbers; the best logit of a
/// softmax has the highest.
constexpr uint32_t kTaken = 0;  // or no expert
constexpr uint32_t kNever = 1;  // a NaN, or outside of the chosen groups
constexpr uint32_t kBest = 0xFFFFFFFFU;

// Where scores in double precision, which the host has, become 0 or 1: logits beyond are ties.
constexpr float kSoftmaxReach = 745.13F;
constexpr float kSigmoidLowest = -709.78F;
constexpr float kSigmoidHighest = 36.7368F;

struct RouteArguments {
  RouteProblem problem;
  bool aligned = false;  // four neighbouring logits come at once
  bool sigmoid = false;
  bool renormalise = false;
  float scale = 1.0F;
  std::int32_t top_k = 1;
  std::int32_t num_groups = 1;
  std::int32_t top_groups = 1;
  std::int32_t per_group = 1;
  std::int32_t group_lanes = 1;  // lanes that look through a group together, a power of two
};

template <int kCount>
struct CorrectionBias {
  float4 values[kCount / 4];
};
template <>
struct CorrectionBias<0> {};

/// Grows with x; 0x007FFFFF for -infinity. No NaN; -0 must have become 0.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits ^ ((bits & 0x80000000U) != 0 ? 0xFFFFFFFFU : 0x80000000U);
}
__device__ __forceinline__ float from_ordered(uint32_t key) {
  return __uint_as_float(key ^ ((key & 0x80000000U) != 0 ? 0x80000000U : 0xFFFFFFFFU));
}

/// The largest over the warp; no NaN.
__device__ __forceinline__ float warp_max(float x) {
  return from_ordered(__reduce_max_sync(kAllLanes, ordered(x)));
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

__device__ __forceinline__ float load_logit(const FloatMatrix& logits, int64_t place) {
  switch (logits.type) {
    case FloatType::kF16:
      return __half2float(static_cast<const __half*>(logits.data)[place]);
    case FloatType::kBF16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(logits.data)[place]);
    default:
      return static_cast<const float*>(logits.data)[place];
  }
}

/// Four neighbours from a place that is aligned to them.
__device__ __forceinline__ float4 load_piece(const FloatMatrix& logits, int64_t place) {
  if (logits.type == FloatType::kF32) {
    return *reinterpret_cast<const float4*>(static_cast<const float*>(logits.data) + place);
  }
  const uint2 words =
      *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(logits.data) + place);
  if (logits.type == FloatType::kBF16) {
    return make_float4(__uint_as_float(words.x << 16), __uint_as_float(words.x & 0xFFFF0000U),
                       __uint_as_float(words.y << 16), __uint_as_float(words.y & 0xFFFF0000U));
  }
  const auto low = [](uint32_t word) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
  };
  return make_float4(low(words.x), low(words.x >> 16), low(words.y), low(words.y >> 16));
}

/// exp(a - b), as exact as if the difference had not been rounded.
__device__ __forceinline__ float exp_of_difference(float a, float b) {
  constexpr float kLeast = -104.0F;  // exp gives 0 below
  const float difference = a - b;
  if (!(difference >= kLeast)) return 0.0F;
  const float b_part = difference - a;
  const float error = (a - (difference - b_part)) - (b + b_part);
  const float result = expf(difference);
  return fmaf(result, error, result);
}

__device__ __forceinline__ float softmax_part(float logit, float largest) {
  if (logit == largest) return 1.0F;  // infinities too
  return isnan(logit) ? 0.0F : exp_of_difference(logit, largest);
}

/// sigmoid(logit) * exp(-shift), for a shift of at most 0 that no logit exceeds where it is not 0.
__device__ __forceinline__ float sigmoid_part(float logit, float shift) {
  if (isnan(logit)) return 0.0F;
  if (logit >= 0.0F) return 1.0F / (1.0F + expf(-logit));
  return exp_of_difference(logit, shift) / (1.0F + expf(logit));
}

/// Keys of the experts outside of the best groups become kNever. By a whole warp; `members` and
/// `groups` are its shared memory, with room for every expert.
template <bool kBiased, int kOwn, class ExpertOf>
__device__ __forceinline__ void keep_top_groups(uint32_t (&keys)[kOwn], const RouteArguments& a,
                                                uint32_t* members, uint32_t* groups,
                                                const ExpertOf& expert_of) {
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (expert_of(i) < a.problem.experts) members[expert_of(i)] = keys[i];
  }
  __syncwarp();
  const auto score = [](uint32_t key) { return key <= kNever ? -INFINITY : from_ordered(key); };
  const int at_once = kLanes / a.group_lanes;
  for (int32_t first = 0; first < a.num_groups; first += at_once) {
    const int32_t group = first + lane / a.group_lanes;
    uint32_t best = kTaken;
    uint32_t second = kTaken;
    if (group < a.num_groups) {
      for (int32_t i = lane % a.group_lanes; i < a.per_group; i += a.group_lanes) {
        const uint32_t key = members[group * a.per_group + i];
        second = max(second, min(best, key));
        best = max(best, key);
      }
    }
    for (int step = a.group_lanes / 2; step > 0; step /= 2) {
      const uint32_t other_best = __shfl_xor_sync(kAllLanes, best, step);
      const uint32_t other_second = __shfl_xor_sync(kAllLanes, second, step);
      second = max(min(best, other_best), max(second, other_second));
      best = max(best, other_best);
    }
    if (group < a.num_groups && lane % a.group_lanes == 0) {
      // The published models add up two experts where there is a correction bias.
      groups[group] = kBiased && a.per_group > 1 ? ordered(score(best) + score(second)) : best;
    }
  }
  __syncwarp();
  uint32_t* const allowed = members;
  for (int32_t group = lane; group < a.num_groups; group += kLanes) {
    const uint32_t key = groups[group];
    int32_t better = 0;
    for (int32_t i = 0; i < a.num_groups; ++i) {
      better += groups[i] > key || (groups[i] == key && i < group) ? 1 : 0;
    }
    allowed[group] = better < a.top_groups ? 1 : 0;
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int32_t expert = expert_of(i);
    if (expert < a.problem.experts && allowed[expert / a.per_group] == 0) keys[i] = kNever;
  }
}

/// A warp takes one token; a lane has kPieces times four neighbouring experts of it.
template <int kPieces, bool kBiased, bool kGrouped>
__global__ void __launch_bounds__(kWarps* kLanes)
    route_rows(const __grid_constant__ RouteArguments a,
               const __grid_constant__ CorrectionBias<kBiased ? kPieces * kPieceOfWarp : 0> bias) {
  constexpr int kOwn = kPieces * kPiece;
  ptx::launch_dependents();
  ptx::wait_for_predecessor();
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;
  const int64_t token = int64_t{blockIdx.x} * kWarps + warp;
  if (token >= a.problem.tokens) return;
  const int32_t experts = a.problem.experts;
  const int64_t row = token * a.problem.logits.row_stride;
  const auto expert_of = [lane](int own) {
    return own / kPiece * kPieceOfWarp + lane * kPiece + own % kPiece;
  };

  float logits[kOwn];
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int32_t first = expert_of(piece * kPiece);
    if (a.aligned && first + kPiece <= experts) {
      const float4 values = load_piece(a.problem.logits, row + first);
      logits[piece * kPiece] = values.x;
      logits[piece * kPiece + 1] = values.y;
      logits[piece * kPiece + 2] = values.z;
      logits[piece * kPiece + 3] = values.w;
    } else {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        logits[piece * kPiece + i] =
            first + i < experts ? load_logit(a.problem.logits, row + first + i) : NAN;
      }
    }
  }

  // What the softmax needs of the whole row: NaNs count for nothing.
  float largest = -INFINITY;
  float sum = 1.0F;
  if (!a.sigmoid) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) largest = fmaxf(largest, logits[i]);
    largest = warp_max(largest);
    if (kBiased || !a.renormalise) {
      sum = 0.0F;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) sum += softmax_part(logits[i], largest);
      sum = warp_sum(sum);
    }
  }
  const float softmax_scale = sum > 0.0F ? 1.0F / sum : 0.0F;

  // Scores grow with the logits, so that these decide where nothing is added to the scores.
  uint32_t keys[kOwn];
  const float floor = largest == INFINITY ? FLT_MAX : largest - kSoftmaxReach;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const float logit = logits[i];
    uint32_t key = kNever;
    if (!isnan(logit)) {
      if constexpr (kBiased) {
        const float4& piece = bias.values[(i / kPiece) * kLanes + lane];
        const float addend = i % kPiece == 0   ? piece.x
                             : i % kPiece == 1 ? piece.y
                             : i % kPiece == 2 ? piece.z
                                               : piece.w;
        const float score =
            a.sigmoid ? sigmoid_part(logit, 0.0F) : softmax_part(logit, largest) * softmax_scale;
        key = ordered(score + addend + 0.0F);
      } else if (a.sigmoid) {
        key = ordered(fminf(fmaxf(logit, kSigmoidLowest), kSigmoidHighest) + 0.0F);
      } else {
        key = logit == largest ? kBest : ordered(fmaxf(logit, floor) + 0.0F);
      }
    }
    keys[i] = expert_of(i) < experts ? key : kTaken;
  }
  if constexpr (kGrouped) {
    __shared__ uint32_t members[kWarps][kPieces * kPieceOfWarp];
    __shared__ uint32_t groups[kWarps][kPieces * kPieceOfWarp];
    keep_top_groups<kBiased>(keys, a, members[warp], groups[warp], expert_of);
  }

  // Lane s gets the expert of slot s.
  int32_t chosen = 0;
  for (int slot = 0; slot < a.top_k; ++slot) {
    uint32_t best = keys[0];
    int32_t at = expert_of(0);
#pragma unroll
    for (int i = 1; i < kOwn; ++i) {
      if (keys[i] > best) {
        best = keys[i];
        at = expert_of(i);
      }
    }
    const uint32_t best_of_all = __reduce_max_sync(kAllLanes, best);
    const int32_t winner = __reduce_min_sync(kAllLanes, best == best_of_all ? at : kMaxExperts);
    if (lane == slot) chosen = winner;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (expert_of(i) == winner) keys[i] = kTaken;
    }
  }

  const bool has_slot = lane < a.top_k;
  const float logit = has_slot ? load_logit(a.problem.logits, row + chosen) : NAN;
  // Not so for NaNs.
  const bool counts =
      a.sigmoid ? logit >= kSigmoidLowest : logit == largest || logit - largest >= -kSoftmaxReach;
  float part = 0.0F;
  float factor = a.scale;
  if (a.renormalise) {
    // Only ratios matter: relative to the best one nothing that counts becomes 0.
    const float best = warp_max(counts ? logit + 0.0F : -INFINITY);
    if (counts) {
      part = a.sigmoid ? sigmoid_part(logit, fminf(best, 0.0F)) : softmax_part(logit, best);
    }
    const float total = warp_sum(part);
    factor = a.scale / (total > 0.0F ? total : 1.0F);
  } else if (counts) {
    part = a.sigmoid ? sigmoid_part(logit, 0.0F) : softmax_part(logit, largest) * softmax_scale;
  }
  if (has_slot) {
    a.problem.ids[token * a.problem.ids_stride + lane] = chosen;
    a.problem.weights[token * a.problem.weights_stride + lane] = part * factor;
  }
}

template <int kPieces, bool kBiased, bool kGrouped>
void launch_route(const RouteArguments& arguments, const RouteOptions& options, bool dependent,
                  void* stream) {
  constexpr int kBias = kBiased ? kPieces * kPieceOfWarp : 0;
  CorrectionBias<kBias> bias{};
  if constexpr (kBiased) {
    std::copy(options.correction_bias.begin(), options.correction_bias.end(),
              reinterpret_cast<float*>(bias.values));
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(arguments.problem.tokens, kWarps)));
  launch_kernel(route_rows<kPieces, kBiased, kGrouped>, grid, kWarps * kLanes, 0, dependent,
                static_cast<cudaStream_t>(stream), arguments, bias);
}

template <int kPieces>
void launch_route(const RouteArguments& arguments, const RouteOptions& options, bool dependent,
                  void* stream) {
  const bool biased = !options.correction_bias.empty();
  if (options.top_groups < options.num_groups) {
    if (biased) {
      launch_route<kPieces, true, true>(arguments, options, dependent, stream);
    } else {
      launch_route<kPieces, false, true>(arguments, options, dependent, stream);
    }
  } else if (biased) {
    launch_route<kPieces, true, false>(arguments, options, dependent, stream);
  } else {
    launch_route<kPieces, false, false>(arguments, options, dependent, stream);
  }
}

}  // namespace

void route(const RouteProblem& problem, const RouteOptions& options, bool dependent_launch,
           void* stream) {
  if (problem.tokens == 0) return;
  const std::int64_t piece_bytes =
      kPiece * (problem.logits.type == FloatType::kF32 ? std::int64_t{4} : 2);
  const auto address = reinterpret_cast<std::uintptr_t>(problem.logits.data);
  const auto groups = static_cast<unsigned>(options.num_groups);
  const RouteArguments arguments{
      .problem = problem,
      .aligned = address % static_cast<std::uintptr_t>(piece_bytes) == 0 &&
                 (problem.tokens == 1 || problem.logits.row_stride % kPiece == 0),
      .sigmoid = options.scoring == Scoring::kSigmoid,
      .renormalise = options.renormalise == Renormalise::kYes,
      .scale = options.scale,
      .top_k = options.top_k,
      .num_groups = options.num_groups,
      .top_groups = options.top_groups,
      .per_group = problem.experts / options.num_groups,
      .group_lanes = std::max(1, kLanes / static_cast<int>(std::bit_ceil(groups)))};
  if (problem.experts <= kPieceOfWarp) {
    launch_route<1>(arguments, options, dependent_launch, stream);
  } else if (problem.experts <= 2 * kPieceOfWarp) {
    launch_route<2>(arguments, options, dependent_launch, stream);
  } else if (problem.experts <= 4 * kPieceOfWarp) {
    launch_route<4>(arguments, options, dependent_launch, stream);
  } else {
    launch_route<8>(arguments, options, dependent_launch, stream);
  }
}

}  // namespace marlinq::cuda
