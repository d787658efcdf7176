// An even division of a range, the same on the host and on the device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MARLINQ_HOST_DEVICE __host__ __device__
#else
#define MARLINQ_HOST_DEVICE
#endif

namespace marlinq::cuda::sm80 {

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
