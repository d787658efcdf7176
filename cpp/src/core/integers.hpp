// Integer arithmetic of shapes and layouts.
#pragma once

#include <cstdint>

namespace marlinq {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) noexcept { return (a + b - 1) / b; }
constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) noexcept {
  return ceil_div(a, b) * b;
}

}  // namespace marlinq
