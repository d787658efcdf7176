#include "support/compare.hpp"

#include <cmath>
#include <string>

namespace marlinq::test {

double linear_bound(std::string_view compute) {
  return compute == "int16"      ? tolerances::kLinearInt16
         : compute == "bfloat16" ? tolerances::kLinearBfloat16
         : compute == "int8"     ? tolerances::kLinearInt8
                                 : tolerances::kLinearFloat32;
}

double moe_bound(std::string_view compute) {
  return compute == "int16"      ? tolerances::kMoeInt16
         : compute == "bfloat16" ? tolerances::kMoeBfloat16
         : compute == "int8"     ? tolerances::kMoeInt8
                                 : tolerances::kMoeFloat32;
}

double bound_for(DType dtype, double compute) {
  return dtype == DType::kFloat16    ? compute + tolerances::kOutputFloat16
         : dtype == DType::kBFloat16 ? compute + tolerances::kOutputBfloat16
                                     : compute;
}

::testing::AssertionResult within(const std::vector<double>& actual,
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

::testing::AssertionResult matches(const Matrix& output, const Product& expected, std::int64_t m,
                                   double compute) {
  return matches_within(output, expected, m, bound_for(output.dtype(), compute));
}

::testing::AssertionResult matches_within(const Matrix& output, const Product& expected,
                                          std::int64_t m, double bound) {
  if (!output.guards_intact(m)) {
    return ::testing::AssertionFailure() << "bytes outside the first " << m << " rows have changed";
  }
  double energy = 0;
  for (std::int64_t i = 0; i < m; ++i) energy += expected.energy[static_cast<std::size_t>(i)];
  const std::vector<double> y(expected.y.begin(), expected.y.begin() + m * expected.n);
  return within(output.values(m), y, energy, expected.n, bound);
}

void expect_error(ErrorCode code, std::initializer_list<std::string_view> parts, Call f) {
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

void expect_refused(std::initializer_list<std::string_view> parts, Call f) {
  expect_error(ErrorCode::kInvalidArgument, parts, f);
}

}  // namespace marlinq::test
