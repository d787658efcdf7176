// How results are judged: the error of a matrix against the reference, and the message of a
// refusal.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <initializer_list>
#include <string_view>
#include <vector>

#include "marlinq/error.hpp"
#include "marlinq_tolerances.hpp"  // generated from tolerances.json
#include "support/generators.hpp"
#include "support/reference.hpp"

namespace marlinq::test {

/// The bound of a linear layer on the CPU, by the name of its compute type.
double linear_bound(std::string_view compute);
/// The bound of a mixture-of-experts block whose layers have that compute type.
double moe_bound(std::string_view compute);

/// The bound for an output of `dtype` whose arithmetic meets `compute`.
double bound_for(DType dtype, double compute = tolerances::kLinearFloat32);

/// Relative Frobenius error; of fewer than 256 elements, against sqrt(sum x^2 w^2) and three times
/// the bound.
::testing::AssertionResult within(const std::vector<double>& actual,
                                  const std::vector<double>& expected, double energy,
                                  std::int64_t columns, double bound);

/// The first `m` rows of an output against the reference, and the guard bytes around them.
::testing::AssertionResult matches(const Matrix& output, const Product& expected, std::int64_t m,
                                   double compute = tolerances::kLinearFloat32);

/// A call without arguments, borrowed.
class Call {
 public:
  template <class F>
  Call(const F& f)  // NOLINT: any callable is one
      : callable_(&f), run_([](const void* callable) { (*static_cast<const F*>(callable))(); }) {}
  void operator()() const { run_(callable_); }

 private:
  const void* callable_;
  void (*run_)(const void*);
};

/// The same with a bound for all of it, the rounding of the output included.
::testing::AssertionResult matches_within(const Matrix& output, const Product& expected,
                                          std::int64_t m, double bound);

/// Calls f, which must throw an Error of `code` whose message holds every one of `parts`.
void expect_error(ErrorCode code, std::initializer_list<std::string_view> parts, Call f);
/// The same for invalid_argument.
void expect_refused(std::initializer_list<std::string_view> parts, Call f);

}  // namespace marlinq::test
