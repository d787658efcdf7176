// What a caller may choose when a weight is loaded.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "marlinq/export.hpp"
#include "marlinq/schedules.hpp"

namespace marlinq {

/// Arithmetic of the CPU backend. Chosen once, at load; it never depends on the number of rows. Every
/// kernel takes every one: where a processor lacks the unit, x is rounded as the type says and
/// multiplied in float32. Errors are relative Frobenius norms on standard normal x.
enum class Compute : std::uint8_t {
  kAuto,      // int16 where the kernel has a unit for it, else float32
  kFloat32,   // at most 2e-6
  kInt16,     // x in 65201 steps a row and 128 packed rows, exact sums: at most 5e-5, and on any x
              // |error| <= max|x| / 65000 * sum|w| over each 128
  kBFloat16,  // x rounded to bfloat16, float32 sums: at most 3e-3
  kInt8,      // x in 255 steps a row and 128 packed rows, exact sums: at most 8e-3
};

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
  /// Used instead of those that come with the library; null: these. Entries of other devices, kernels and layers do not
  /// matter; for one of this layer that its kernels do not know the load throws invalid_argument. Batch-invariant layers
  /// take none. The CPU backend has none, and refuses them as `unsupported`.
  std::shared_ptr<const Schedules> schedules = nullptr;
};

}  // namespace marlinq
