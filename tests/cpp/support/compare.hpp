// How results are judged: the error of a matrix against the reference, and the message of a refusal.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "marlinq/error.hpp"
#include "marlinq_tolerances.hpp"  // generated from tolerances.json
#include "support/generators.hpp"
#include "support/reference.hpp"

namespace marlinq::test {

/// The bound for an output of `dtype` whose arithmetic meets `compute`.
inline double bound_for(DType dtype, double compute = tolerances::kLinearFloat32) {
  return dtype == DType::kFloat16    ? compute + tolerances::kOutputFloat16
         : dtype == DType::kBFloat16 ? compute + tolerances::kOutputBfloat16
                                     : compute;
}

/// Relative Frobenius error; of fewer than 256 elements, against sqrt(sum x^2 w^2) and three times
/// the bound.
inline ::testing::AssertionResult within(const std::vector<double>& actual,
                                         const std::vector<double>& expected, double energy,
                                         std::int64_t columns, double bound) {
  constexpr std::size_t kSmall = 256;
  if (actual.size() != expected.size()) {
    return ::testing::AssertionFailure()
           << actual.size() << " elements, expected " << expected.size();
  }
  if (expected.empty()) return ::testing::AssertionSuccess();
  double error = 0;
  double norm = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    error += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  const bool small = expected.size() < kSmall;
  if (small) norm = energy;
  const double allowed = small ? tolerances::kSmallOutputFactor * bound : bound;
  // Written so that a NaN fails.
  if (std::sqrt(error) <= allowed * std::sqrt(norm)) return ::testing::AssertionSuccess();
  const double typical = std::sqrt(norm / static_cast<double>(expected.size()));
  std::size_t first = 0;
  while (first + 1 < expected.size() &&
         std::fabs(actual[first] - expected[first]) <= 3 * allowed * typical) {
    ++first;
  }
  const auto index = static_cast<std::int64_t>(first);
  return ::testing::AssertionFailure()
         << "relative error " << std::sqrt(error / norm) << ", allowed " << allowed << " of "
         << expected.size() << " elements; first bad index [" << index / columns << ", "
         << index % columns << "]: " << actual[first] << ", expected " << expected[first];
}

/// The first `m` rows of an output against the reference, and the guard bytes around them.
inline ::testing::AssertionResult matches(const Matrix& output, const Product& expected,
                                          std::int64_t m,
                                          double compute = tolerances::kLinearFloat32) {
  if (!output.guards_intact(m)) {
    return ::testing::AssertionFailure() << "bytes outside the first " << m << " rows have changed";
  }
  double energy = 0;
  for (std::int64_t i = 0; i < m; ++i) energy += expected.energy[static_cast<std::size_t>(i)];
  const std::vector<double> y(expected.y.begin(), expected.y.begin() + m * expected.n);
  return within(output.values(m), y, energy, expected.n, bound_for(output.dtype(), compute));
}

/// Calls f, which must throw an Error of `code` whose message holds every one of `parts`.
template <class F>
void expect_error(ErrorCode code, std::initializer_list<std::string_view> parts, F&& f) {
  try {
    f();
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_EQ(to_string(error.code()), to_string(code)) << message;
    for (const std::string_view part : parts) {
      EXPECT_NE(message.find(part), std::string::npos)
          << "message: " << message << "\nlacks: " << part;
    }
    return;
  }
  ADD_FAILURE() << "nothing was thrown, expected " << to_string(code);
}

template <class F>
void expect_refused(std::initializer_list<std::string_view> parts, F&& f) {
  expect_error(ErrorCode::kInvalidArgument, parts, std::forward<F>(f));
}

}  // namespace marlinq::test
