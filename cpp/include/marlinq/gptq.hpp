// A GPTQ weight as a checkpoint holds it, and the check that everything else relies on.
// Format: docs/format.md. With K input features, N output features, b bits and G = ceil(K /
// group_size):
//   y[m, n] = sum_k x[m, k] * (q[k, n] - zero[g(k), n]) * scale[g(k), n] + bias[n]
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "marlinq/export.hpp"
#include "marlinq/types.hpp"

namespace marlinq {

/// A tensor in host memory that somebody else owns. The address may have any alignment.
struct HostTensor {
  const void* data = nullptr;
  std::size_t bytes = 0;
  DType dtype = DType::kInt32;
  std::array<std::int64_t, 2> shape = {0, 0};
  int rank = 0;  // 0: the tensor is absent

  bool present() const noexcept { return rank != 0; }
};

/// One quantised module. `name` only goes into messages: "<name>.qweight: ...".
struct GptqModule {
  std::string name;
  HostTensor qweight;  // i32 [ceil(K * b / 32), N], codes packed along K
  HostTensor scales;   // f32, f16 or bf16 [G, N]
  HostTensor
      qzeros;  // i32 [G, ceil(N * b / 32)], packed along N; absent: every zero point is 2^(b-1)
  HostTensor
      g_idx;  // i32 [K], group of each row, negative values count from G; absent: k / group_size
  HostTensor bias;  // f32, f16 or bf16 [N]; absent: none
};

/// One linear layer: a module, or several that share K and are fused along N in the order given.
/// Each keeps its own act-order permutation.
struct GptqTensors {
  std::vector<GptqModule> modules;

  GptqTensors() = default;
  GptqTensors(GptqModule module) {
    modules.push_back(std::move(module));
  }  // NOLINT: a module is a layer
  explicit GptqTensors(std::vector<GptqModule> parts) : modules(std::move(parts)) {}
};

/// How a file stores a zero point z: v1 ("gptq") as z - 1, v2 ("gptq_v2", "gptq_p") as z.
enum class ZeroPoints : std::uint8_t {
  kAuto,  // by the codes where they decide, else by GptqSpec::labelled
  kV1,
  kV2,
};

enum class Symmetry : std::uint8_t { kUnknown, kSymmetric, kAsymmetric };

/// What the caller knows of a layer. Everything is checked against the tensors.
struct GptqSpec {
  int bits = 4;                   // 2, 3, 4 or 8
  std::int64_t group_size = 128;  // -1: one group over all of K
  std::int64_t k = 0;             // input features; 0: from g_idx, else from the rows of qweight
  std::int64_t n = 0;             // output features of all fused modules; 0: from qweight
  ZeroPoints zero_points = ZeroPoints::kAuto;
  /// What the checkpoint's configuration claims. With kAuto, a module whose stored codes are all
  /// 2^(b-1) - 1 is v1 and one whose codes are all 2^(b-1) is v2 unless the configuration says
  /// kAsymmetric; any other module follows `labelled` (kAuto: v1).
  ZeroPoints labelled = ZeroPoints::kAuto;
  Symmetry symmetry = Symmetry::kUnknown;
};

/// One module after validate(): every size, dtype and range is right, and nothing has been copied.
struct ValidatedModule {
  std::string name;
  const std::uint8_t* qweight = nullptr;
  const std::uint8_t* qzeros = nullptr;  // null: every zero point is 2^(b-1)
  const std::uint8_t* scales = nullptr;
  const std::uint8_t* bias = nullptr;  // null: none
  DType scale_dtype = DType::kFloat16;
  DType bias_dtype = DType::kFloat16;
  std::int64_t n = 0;
  ZeroPoints zero_points = ZeroPoints::kV1;  // kV1 or kV2, as decided
  bool symmetric = false;                    // every zero point is 2^(b-1)
  float least_scale = 0;                     // least magnitude of a scale that is not 0; 0: none
  float most_scale = 0;                      // largest magnitude of a scale
  /// Group of each input row, in [0, G).
  std::vector<std::int32_t> group_of_row;
  bool act_order = false;  // group_of_row is not k / group_size
  std::size_t bytes = 0;   // of the module's tensors as stored
};

/// A layer that validate() accepted: the only thing that repacking takes. Borrows the tensors.
struct GptqWeights {
  int bits = 4;
  std::int64_t k = 0;
  std::int64_t n = 0;
  std::int64_t group_size = 0;  // k where the spec said -1
  std::int64_t groups = 0;
  std::vector<ValidatedModule> modules;
  std::vector<std::string>
      warnings;  // what a user should hear of, such as zero points an old writer lost
};

/// Checks shapes, lengths, dtypes and ranges, and decides the zero-point convention.
/// Throws invalid_argument that names the tensor, what came and what was needed.
MARLINQ_API GptqWeights validate(const GptqTensors& tensors, const GptqSpec& spec);

}  // namespace marlinq
