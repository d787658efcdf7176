// An even division of a range, the same on the host and on the device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MARLINQ_HOST_DEVICE __host__ __device__
#else
#define MARLINQ_HOST_DEVICE
#endif

namespace marlinq::cuda::sm80 {

/// n / d by a multiplication, for 0 <= n < 2^31 and 0 < d < 2^31 (Granlund and Montgomery, "Division
/// by invariant integers using multiplication", 1994).
struct Divider {
  std::int32_t divisor = 1;
  std::uint32_t factor = 1;
  std::int32_t shift = 0;

  Divider() = default;
  explicit Divider(std::int32_t d) : divisor(d) {
    while (shift < 31 && (std::uint32_t{1} << shift) < static_cast<std::uint32_t>(d)) ++shift;
    factor = static_cast<std::uint32_t>(
        ((std::uint64_t{1} << shift) - static_cast<std::uint32_t>(d)) * (std::uint64_t{1} << 32) /
            static_cast<std::uint32_t>(d) +
        1);
  }

  MARLINQ_HOST_DEVICE std::int32_t divide(std::int32_t n) const {
    const auto high = static_cast<std::uint32_t>(
        (std::uint64_t{factor} * static_cast<std::uint32_t>(n)) >> 32);
    return static_cast<std::int32_t>((high + static_cast<std::uint32_t>(n)) >> shift);
  }
};

/// [0, total) in `parts` contiguous parts; the first total % parts have one element more.
struct EvenShare {
  std::int32_t total = 0;
  std::int32_t parts = 0;
  std::int32_t least = 0;  // elements of a part
  std::int32_t rest = 0;   // parts that have one more

  EvenShare() = default;
  MARLINQ_HOST_DEVICE EvenShare(std::int32_t total_, std::int32_t parts_)
      : total(total_),
        parts(parts_),
        least(parts_ > 0 ? total_ / parts_ : 0),
        rest(parts_ > 0 ? total_ % parts_ : 0) {}

  MARLINQ_HOST_DEVICE std::int32_t begin(std::int32_t part) const {
    return part * least + (part < rest ? part : rest);
  }
  MARLINQ_HOST_DEVICE std::int32_t size(std::int32_t part) const {
    return least + (part < rest ? 1 : 0);
  }
  /// The part that has an element.
  MARLINQ_HOST_DEVICE std::int32_t part_of(std::int32_t element) const {
    const std::int32_t in_larger = rest * (least + 1);
    return element < in_larger ? element / (least + 1) : rest + (element - in_larger) / least;
  }
};

/// Strip groups of up to 4 strips, of any of the blocks that share all strips.
MARLINQ_HOST_DEVICE inline std::int32_t strip_groups_at_most(const EvenShare& strips) {
  return (strips.least + (strips.rest > 0 ? 1 : 0) + 3) / 4;
}

}  // namespace marlinq::cuda::sm80
