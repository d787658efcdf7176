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
  MARLINQ_HOST_DEVICE explicit Divider(std::int32_t d) : divisor(d) {
    while (shift < 31 && (std::uint32_t{1} << shift) < static_cast<std::uint32_t>(d)) ++shift;
    factor =
        static_cast<std::uint32_t>(((std::uint64_t{1} << shift) - static_cast<std::uint32_t>(d)) *
                                       (std::uint64_t{1} << 32) / static_cast<std::uint32_t>(d) +
                                   1);
  }

  MARLINQ_HOST_DEVICE std::int32_t divide(std::int32_t n) const {
    const auto high =
        static_cast<std::uint32_t>((std::uint64_t{factor} * static_cast<std::uint32_t>(n)) >> 32);
    return static_cast<std::int32_t>((high + static_cast<std::uint32_t>(n)) >> shift);
  }
};

/// The same by an ordinary division, for what only the device knows.
struct PlainDivider {
  std::int32_t divisor = 1;

  PlainDivider() = default;
  MARLINQ_HOST_DEVICE explicit PlainDivider(std::int32_t d) : divisor(d) {}

  MARLINQ_HOST_DEVICE std::int32_t divide(std::int32_t n) const {
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(n) /
                                     static_cast<std::uint32_t>(divisor));
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
};

/// The chunks of some tiles in contiguous runs, one for each block. Where the blocks are a multiple of
/// the tiles no run crosses into the next tile; elsewhere all tiles are one range, divided evenly.
template <class Divider_>
struct TileCutsBy {
  Divider_ blocks;  // of a range
  Divider_ chunks;  // of a range
  EvenShare runs;   // of a range
  Divider_ larger_run;
  Divider_ smaller_run;

  TileCutsBy() = default;
  MARLINQ_HOST_DEVICE TileCutsBy(std::int32_t tiles, std::int32_t tile_chunks,
                                 std::int32_t num_blocks) {
    if (tiles == 0) return;
    const std::int32_t ranges = num_blocks % tiles == 0 ? tiles : 1;
    blocks = Divider_(num_blocks / ranges);
    chunks = Divider_(tiles / ranges * tile_chunks);
    runs = EvenShare(chunks.divisor, blocks.divisor);
    larger_run = Divider_(runs.least + 1);
    smaller_run = Divider_(runs.least > 0 ? runs.least : 1);
  }

  /// The first chunk of a block's run; for the block after the last, the end.
  MARLINQ_HOST_DEVICE std::int32_t begin(std::int32_t block) const {
    const std::int32_t range = blocks.divide(block);
    return range * chunks.divisor + runs.begin(block - range * blocks.divisor);
  }
  /// The block in whose run a chunk lies.
  MARLINQ_HOST_DEVICE std::int32_t block_of(std::int32_t chunk) const {
    const std::int32_t range = chunks.divide(chunk);
    const std::int32_t within = chunk - range * chunks.divisor;
    const std::int32_t in_larger = runs.rest * (runs.least + 1);
    return range * blocks.divisor + (within < in_larger
                                         ? larger_run.divide(within)
                                         : runs.rest + smaller_run.divide(within - in_larger));
  }
};

using TileCuts = TileCutsBy<Divider>;

/// Strip groups of up to 4 strips, of any of the blocks that share all strips.
MARLINQ_HOST_DEVICE inline std::int32_t strip_groups_at_most(const EvenShare& strips) {
  return (strips.least + (strips.rest > 0 ? 1 : 0) + 3) / 4;
}

}  // namespace marlinq::cuda::sm80
