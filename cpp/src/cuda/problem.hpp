// What crosses from the host to a kernel of the CUDA backend: plain structs, no CUDA header.
#pragma once

#include <cstdint>
#include <span>

#include "marlinq/moe_block.hpp"

namespace marlinq::cuda {

enum class FloatType : std::uint8_t { kF32, kF16, kBF16 };

/// One packed weight on a device, as kernels see it; the arrays are those of the architecture's
/// layout.hpp.
struct WeightView {
  const std::uint32_t* codes = nullptr;
  const unsigned char* groups = nullptr;  // scales and zero points
  const std::int32_t* chunk_groups = nullptr;
  std::int32_t chunk_shift = -1;  // at least 0: the group of a whole chunk is chunk >> chunk_shift
  std::int32_t step_shift = -1;   // the same of 16 rows
  const float* bias = nullptr;    // null: none
  // Input row of each packed row, -1 padding; null: the same row.
  const std::int32_t* source = nullptr;
  FloatType scale_type = FloatType::kF16;
  std::int32_t code_bits = 4;
  std::int32_t middle = 8;        // the zero point of every code where records hold none
  std::int32_t record_bytes = 0;  // of one strip and group
  bool has_zeros = false;
  bool small_scales = true;   // codes times scales stay far from the largest float16
  bool scales_divide = true;  // quotients of any two scales of a feature stay far from overflow
  std::int32_t n = 0;
  std::int32_t k = 0;
  std::int32_t chunks = 0;
  std::int32_t num_groups = 0;
  std::int32_t groups_per_chunk = 1;  // at most
};

/// y = x W^T + bias for rows of x that a kernel can read 16 bytes at a time.
struct GemmProblem {
  WeightView weight;
  const void* x = nullptr;
  FloatType x_type = FloatType::kF16;  // kF16 or kBF16
  std::int64_t x_stride = 0;           // elements
  std::int32_t x_columns = 0;          // readable; packed rows beyond meet 0
  void* y = nullptr;
  FloatType y_type = FloatType::kF16;
  std::int64_t y_stride = 0;
  std::int32_t m = 0;
};

/// The experts of each token, [tokens, top_k] on the device. Any id outside of the experts at hand
/// counts as -1: no expert.
struct TopkIds {
  const void* data = nullptr;
  bool wide = false;            // int64, else int32
  std::int64_t row_stride = 0;  // elements
  std::int32_t tokens = 0;
  std::int32_t top_k = 1;  // tokens * top_k is at most 2^30
};

/// The token tiles of a product over experts, on the device. What a tile holds are ids: a slot each.
struct TokenTileLists {
  /// Instead of the lists: the kernel sorts these by itself. Slots are in the order of the experts, those of
  /// an expert in the order of their ids; ids of no expert have none.
  TopkIds topk = {};
  const std::int32_t* experts = nullptr;  // [tiles]; one that there is not: the rows become 0
  const std::int32_t* ids = nullptr;      // [slots]; one outside of 0 to num_ids - 1: no row
  const std::int32_t* first = nullptr;    // [tiles] first slot; null: tile * tile_rows
  const std::int32_t* rows = nullptr;     // [tiles]; null: tile_rows
  const std::int32_t* used = nullptr;     // [1] how many tiles count; where first is null, slots
  std::int32_t tile_rows = 0;             // at most
  std::int32_t most_tiles = 0;            // room in the lists
  std::int64_t most_slots = 0;
  std::int32_t num_ids = 0;
  /// The lists are older than the kernel before, which started after they had been written: a product may
  /// read them, and ask for weights, before that kernel has ended.
  bool settled = false;
};

/// Consecutive rows through one expert.
struct ExpertRows {
  std::int32_t expert = 0;
  std::int32_t input_row = 0;
  std::int32_t output_row = 0;
  std::int32_t rows = 0;
};

/// A product over experts, y[row of an id] = x[row of the id] W[expert of its tile]^T + bias.
struct ExpertProblem {
  GemmProblem matrix = {};        // of expert 0; m is not used
  std::int64_t expert_bytes = 0;  // from the packed weight of an expert to that of the next
  std::int32_t num_experts = 0;
  TokenTileLists tiles = {};
  /// Instead of tiles, in host memory: no more than a launch takes.
  std::span<const ExpertRows> dispatches = {};
  std::int32_t top_k = 1;  // the row of x of an id is id / top_k, ...
  bool x_by_slot = false;  // ... or that of its slot
  bool y_by_slot = false;  // the row of y of an id is the id, or its slot
  // Outputs are multiplied by the weight of their id, weights[id / top_k, id % top_k]; null: 1.
  const float* weights = nullptr;
  std::int64_t weights_stride = 0;
  bool weights_bias = true;  // the bias too
  /// Features come in two halves, g and u: y has half as many, act(g, u).
  bool activates = false;
  Activation activation = Activation::kSilu;
  /// The kernel before is the first product of the same block.
  bool follows_product = false;
};

/// How a product over experts is run.
struct ExpertPlan {
  std::int32_t instance = 0;
  std::int32_t tokens = 0;  // of a tile; a dispatch fills whole tiles
  std::int32_t blocks = 1;
  std::int32_t shared_bytes = 0;
  bool may_cut = true;  // tiles along K
  /// Blocks that share each tile of the tail, for benchmarks; 0: what the kernel estimates to be quickest.
  std::int32_t share = 0;
  std::int32_t stages = 0;  // of the ring, where an architecture leaves them to the plan, ...
  std::int32_t warps = 0;   // ... and these of a block
  bool dependent_launch = false;
};

/// Memory through which blocks that share a product's tile hand over their sums; kernels leave the
/// flags at 0.
struct SplitScratch {
  float* partials = nullptr;
  std::uint32_t* flags = nullptr;
};

struct DeviceLimits {
  std::int32_t multiprocessors = 0;
  std::int32_t shared_bytes = 0;  // of a block, at most
  std::int32_t multiprocessor_shared_bytes =
      0;                         // of the blocks on one multiprocessor, 1 KiB each apart
  std::int32_t capability = 0;   // 10 * major + minor
  std::int32_t memory_rate = 0;  // GB/s, as memory is clocked
};

enum class KernelKind : std::uint8_t {
  kStrip,  // few tokens: whole strips a block, K over its warps
  kTile,   // tiles of tokens x features, K perhaps split over blocks
};

/// How the blocks of a tile kernel share the tiles: `whole_tiles` each, then the first `tail_blocks`
/// share the chunks of the `tail_tiles` that are left, each a contiguous run. Where blocks of a cluster have tiles side by side, a
/// cluster counts as a block here.
struct TileSchedule {
  std::int32_t whole_tiles = 0;
  std::int32_t tail_tiles = 0;
  std::int32_t tail_blocks = 0;
  std::int32_t token_band = 1;  // token tiles that are walked through before the next feature tile
  /// Where not 0, every tile is cut along K into so many parts, which blocks next to each other have.
  std::int32_t parts = 0;
  /// Where not 0: the blocks of each tile of the tail, an even number; those next to each other are a cluster, and add up
  /// their sums before they hand them over. There are no whole tiles then.
  std::int32_t pair_parts = 0;

  bool operator==(const TileSchedule&) const = default;
};

/// How a problem is run; the pure result of plan().
struct GemmPlan {
  KernelKind kind = KernelKind::kTile;
  std::int32_t instance = 0;  // of the architecture's table for the types at hand
  std::int32_t blocks = 1;
  std::int32_t warps = 8;  // of a block
  std::int32_t cluster_blocks = 1;
  std::int32_t shared_bytes = 0;
  std::int32_t tokens = 8;  // rows of x that one launch takes: all of m, or slices of this many
  TileSchedule schedule;    // kTile
  // Where an architecture leaves them to the plan: the stages of the rings, how many of them are filled
  // before the kernel before has ended, and halves of packed blocks that are shared out together.
  std::int32_t stages = 0;
  std::int32_t early_stages = 0;
  std::int32_t share_halves = 1;
  /// The kernel may start before the one before it has ended, and waits for it by itself.
  bool dependent_launch = false;

  bool operator==(const GemmPlan&) const = default;
};

}  // namespace marlinq::cuda
