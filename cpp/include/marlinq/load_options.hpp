// What a caller may choose when a weight is loaded.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "marlinq/export.hpp"

namespace marlinq {

/// Arithmetic of the CPU backend. Chosen once, at load; it never depends on the number of rows.
enum class Compute : std::uint8_t { kAuto, kFloat32, kInt16, kBFloat16, kInt8 };

/// "auto", "float32", "int16", "bfloat16", "int8".
MARLINQ_API std::string_view to_string(Compute compute) noexcept;

/// The inverse of to_string. Throws invalid_argument.
MARLINQ_API Compute parse_compute(std::string_view text);

/// Whether a row's result may depend on the other rows of the batch.
enum class BatchInvariance : std::uint8_t {
  kNotRequired,
  kRequired,  // row i alone equals row i in any batch, bit for bit
};

struct LoadOptions {
  Compute compute = Compute::kAuto;
  BatchInvariance batch_invariance = BatchInvariance::kNotRequired;
  /// Forces a kernel by one of the names that describe_host() lists; empty lets the backend choose.
  /// A name that this machine cannot run is `unsupported`, an unknown one `invalid_argument`.
  std::string kernel = {};
};

}  // namespace marlinq
