// A run of packed rows that share one group. Plain data, also for objects compiled for one
// instruction set.
#pragma once

#include <cstdint>

namespace marlinq {

struct RowBlock {
  std::int32_t first = 0;  // packed row
  std::int32_t count = 0;
  std::int32_t group = 0;

  friend bool operator==(const RowBlock&, const RowBlock&) = default;
};

}  // namespace marlinq
