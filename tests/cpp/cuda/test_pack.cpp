// Packing for the sm_80 kernels, run on the host: the plan of a layer's memory, the pieces in which a
// layer comes, and every byte of the packed order. Needs no GPU and no CUDA.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "core/codes.hpp"
#include "core/gptq_checks.hpp"
#include "cuda/arch/sm80/pack_plan.hpp"
#include "cuda/host_packing.hpp"
#include "cuda/packed_layer.hpp"
#include "cuda/raw_pieces.hpp"
#include "support/compare.hpp"
#include "support/numbers.hpp"

namespace marlinq {
namespace {

using cuda::plan_pieces;
using cuda::RawPiece;
using cuda::RawRows;
using cuda::sm80::LayerPlan;
using cuda::sm80::Layout;
using cuda::sm80::plan_layer;
using cuda::sm80::SegmentPlan;
using test::Layer;
using test::make_layer;
using test::Order;
using test::PackCase;
using test::same;
using test::Zeros;
using Bytes = std::vector<unsigned char>;

LayerPlan plan_of(const std::vector<Layer>& parts) {
  return plan_layer(validate(test::fused(parts), parts.front().spec()));
}

const std::vector<PackCase>& cases() {
  static const std::vector<PackCase> all = test::pack_cases();
  return all;
}

// --- the order ---

TEST(Sm80LayoutTest, WordsOfEachPartAreNumberedOnce) {
  for (const int bits : {4, 8}) {
    const Layout layout{.code_bits = bits, .n = 100, .chunks = 3, .groups = 5};
    EXPECT_EQ(layout.blocks(), 2);
    std::vector<int> seen(static_cast<std::size_t>(layout.words()));
    for (std::int64_t strip = 0; strip < 8; ++strip) {
      for (std::int64_t chunk = 0; chunk < 3; ++chunk) {
        for (int piece = 0; piece < layout.pieces(); ++piece) {
          for (int lane = 0; lane < 32; ++lane) {
            for (int word = 0; word < 4; ++word) {
              ++seen[static_cast<std::size_t>(layout.word(strip, chunk, piece, lane, word))];
            }
          }
        }
      }
    }
    EXPECT_EQ(std::count(seen.begin(), seen.end(), 1), layout.words());
  }
}

TEST(Sm80LayoutTest, RecordsHoldEachScaleAndZeroPointOnce) {
  for (const int scale_bytes : {2, 4}) {
    const Layout layout{
        .scale_bytes = scale_bytes, .has_zeros = true, .n = 64, .chunks = 1, .groups = 1};
    std::vector<int> seen(static_cast<std::size_t>(layout.record_bytes()));
    for (int feature = 0; feature < 16; ++feature) {
      for (int byte = 0; byte < scale_bytes; ++byte) {
        ++seen[static_cast<std::size_t>(layout.scale_place(feature) + byte)];
      }
      ++seen[static_cast<std::size_t>(layout.zero_place(feature))];
    }
    EXPECT_EQ(std::count(seen.begin(), seen.end(), 1), layout.record_bytes());
  }
}

// --- the plan ---

TEST(Sm80PlanTest, PartsFollowOneAnother) {
  for (const PackCase& one : cases()) {
    SCOPED_TRACE(one.what);
    const LayerPlan plan = plan_layer(validate(one.tensors(), one.spec()));
    std::int64_t end = 0;
    const auto follows = [&end](std::int64_t place, std::int64_t bytes) {
      EXPECT_EQ(place, end);
      EXPECT_EQ(place % 256, 0);
      end = test::divide_up(place + bytes, 256) * 256;
    };
    for (const SegmentPlan& s : plan.segments) {
      follows(s.places.codes, s.layout.words() * 4);
      follows(s.places.groups, s.layout.group_bytes());
      follows(s.places.chunk_groups, s.layout.chunks * 4);
      if (s.places.source >= 0) follows(s.places.source, s.layout.chunks * 64 * 4);
      if (s.places.bias >= 0) follows(s.places.bias, s.layout.n * 4);
      EXPECT_EQ(s.places.source >= 0, !s.identity);
      EXPECT_EQ(s.places.end, end);
    }
    EXPECT_EQ(plan.bytes, end);
    if (HasFailure()) return;
  }
}

TEST(Sm80PlanTest, ChunksOfPowersOfTwoShift) {
  const std::map<std::int64_t, std::int32_t> shifts = {{64, 0},  {128, 1}, {256, 2},  {1024, 4},
                                                       {16, -1}, {32, -1}, {192, -1}, {96, -1}};
  for (const auto& [group_size, shift] : shifts) {
    const LayerPlan plan = plan_of({make_layer({.k = 2048, .n = 8, .group_size = group_size})});
    EXPECT_EQ(plan.segments[0].chunk_shift, shift) << group_size;
  }
  // One group: any shift that takes every chunk to 0.
  const LayerPlan plan = plan_of({make_layer({.k = 2048, .n = 8, .group_size = -1})});
  EXPECT_EQ(31 >> plan.segments[0].chunk_shift, 0);
}

TEST(Sm80PlanTest, StepsOfPowersOfTwoShift) {
  const std::map<std::int64_t, std::int32_t> shifts = {{16, 0},  {32, 1},   {64, 2},  {128, 3},
                                                       {256, 4}, {1024, 6}, {48, -1}, {96, -1}};
  for (const auto& [group_size, shift] : shifts) {
    const LayerPlan plan = plan_of({make_layer({.k = 2048, .n = 8, .group_size = group_size})});
    EXPECT_EQ(plan.segments[0].step_shift, shift) << group_size;
  }
  // The last chunk is not full, and its padding counts to the last group.
  const LayerPlan part = plan_of({make_layer({.k = 96, .n = 8, .group_size = 32})});
  EXPECT_EQ(part.segments[0].step_shift, -1);
  const LayerPlan plan = plan_of({make_layer({.k = 2048, .n = 8, .group_size = -1})});
  EXPECT_EQ(127 >> plan.segments[0].step_shift, 0);
  // One group is no short one: its weights may be so few that they are not to be rounded.
  for (const std::int64_t k : {1, 16, 48, 64}) {
    const LayerPlan few = plan_of({make_layer({.k = k, .n = 8, .group_size = 64})});
    EXPECT_GE(few.segments[0].step_shift, 3) << k;
  }
}

TEST(Sm80PlanTest, ChunkGroupsSayWhereGroupsBegin) {
  EXPECT_EQ(cuda::sm80::chunk_groups_word({5, 5, 5, 5}), 5 << 4);
  EXPECT_EQ(cuda::sm80::chunk_groups_word({0, 1, 2, 3}), 0b1110);
  EXPECT_EQ(cuda::sm80::chunk_groups_word({7, 7, 8, 8}), 7 << 4 | 0b0100);
  const LayerPlan plan = plan_of({make_layer({.k = 100, .n = 8, .group_size = 32})});
  const SegmentPlan& s = plan.segments[0];
  EXPECT_EQ(s.chunk_groups, (std::vector<std::int32_t>{0b0100, 2 << 4 | 0b0100}));
  EXPECT_EQ(s.groups_per_chunk, 2);
}

TEST(Sm80PlanTest, RowsArePaddedToStepsAndChunks) {
  // Groups of 24 rows become 32.
  const LayerPlan padded = plan_of({make_layer({.k = 72, .n = 8, .group_size = 24})});
  EXPECT_FALSE(padded.segments[0].identity);
  EXPECT_EQ(padded.segments[0].layout.chunks, 2);
  EXPECT_EQ(padded.segments[0].source[23], 23);
  EXPECT_EQ(padded.segments[0].source[24], -1);
  EXPECT_EQ(padded.segments[0].source[32], 24);
  const LayerPlan plain = plan_of({make_layer({.k = 100, .n = 8, .group_size = 48})});
  EXPECT_TRUE(plain.segments[0].identity);
  EXPECT_EQ(plain.segments[0].layout.chunks, 2);
}

TEST(Sm80PlanTest, ModulesOfOneOrderAndScaleDtypeShareASegment) {
  const auto module = [](std::int64_t n, DType scales, std::uint64_t seed) {
    return make_layer({.k = 256,
                       .n = n,
                       .group_size = 32,
                       .order = Order::kActOrder,
                       .scales = scales,
                       .seed = seed});
  };
  const Layer q = module(40, DType::kFloat16, 1);
  Layer k = module(24, DType::kFloat16, 2);
  EXPECT_EQ(plan_of({q, k}).segments.size(), 2U);
  k.g_idx = q.g_idx;
  const LayerPlan together = plan_of({q, k});
  ASSERT_EQ(together.segments.size(), 1U);
  EXPECT_EQ(together.segments[0].layout.n, 64);
  EXPECT_EQ(&segment_of(together, 1), &together.segments[0]);
  Layer v = module(8, DType::kFloat32, 3);
  v.g_idx = q.g_idx;
  const LayerPlan apart = plan_of({q, v, k});
  ASSERT_EQ(apart.segments.size(), 3U);
  EXPECT_EQ(apart.segments[1].first_feature, 40);
  EXPECT_EQ(apart.segments[2].first_feature, 48);
  EXPECT_EQ(&segment_of(apart, 2), &apart.segments[2]);
}

// --- the pieces ---

// What a device would hold of a piece.
Bytes stage(const RawPiece& piece) {
  Bytes staged(static_cast<std::size_t>(piece.bytes), 0xCD);
  for (const RawRows* rows : {&piece.qweight, &piece.scales, &piece.qzeros}) {
    for (std::int64_t row = 0; row < rows->rows; ++row) {
      std::memcpy(staged.data() + rows->offset + row * rows->row_bytes,
                  rows->data + row * rows->pitch, static_cast<std::size_t>(rows->row_bytes));
    }
  }
  return staged;
}

TEST(RawPiecesTest, CoverEveryRowAndColumnOnceWithinTheirTarget) {
  for (const PackCase& one : cases()) {
    for (const std::int64_t target : {1, 3000, 20000, 1 << 30}) {
      SCOPED_TRACE(one.what + ", target " + std::to_string(target));
      const GptqTensors tensors = one.tensors();
      const GptqWeights weights = check_structure(tensors, one.spec());
      const std::vector<RawPiece> pieces = plan_pieces(weights, target);
      std::vector<std::int64_t> covered(weights.modules.size());
      std::size_t module = 0;
      for (const RawPiece& piece : pieces) {
        EXPECT_GE(piece.module, module);
        module = piece.module;
        const std::int64_t n = weights.modules[module].n;
        EXPECT_TRUE(piece.rows == weights.k || piece.columns == n);
        EXPECT_EQ(piece.first_row % 64, 0);
        EXPECT_EQ(piece.first_column % 64, 0);
        EXPECT_TRUE(piece.rows % 64 == 0 || piece.first_row + piece.rows == weights.k);
        EXPECT_TRUE(piece.columns % 64 == 0 || piece.first_column + piece.columns == n);
        EXPECT_EQ(covered[module], piece.first_row * n + piece.first_column * weights.k);
        covered[module] += piece.rows * piece.columns;
        // One unit of rows may touch a group more than the first, by which pieces are measured.
        const bool unit = piece.rows <= 64 || piece.columns <= 64;
        EXPECT_TRUE(piece.bytes <= target || unit) << piece.bytes;
        EXPECT_LE(piece.groups, weights.groups);
      }
      for (std::size_t i = 0; i < covered.size(); ++i) {
        EXPECT_EQ(covered[i], weights.k * weights.modules[i].n);
      }
      if (target == 1 << 30) {
        EXPECT_EQ(pieces.size(), weights.modules.size());
      }
      if (HasFailure()) return;
    }
  }
}

TEST(RawPiecesTest, PlainRowsTravelInOneRun) {
  const Layer layer = make_layer({.k = 512, .n = 200, .group_size = 32});
  const std::vector<RawPiece> pieces =
      plan_pieces(check_structure(layer.tensors(), layer.spec()), 16000);
  EXPECT_GT(pieces.size(), 2U);
  for (const RawPiece& piece : pieces) {
    EXPECT_EQ(piece.columns, 200);
    EXPECT_TRUE(piece.qweight.contiguous() && piece.scales.contiguous());
    EXPECT_EQ(piece.first_group, piece.first_row / 32);
    EXPECT_EQ(piece.groups, piece.rows / 32);
    EXPECT_EQ(piece.table, 0);
  }
  const Layer gathered =
      make_layer({.k = 512, .n = 200, .group_size = 32, .order = Order::kActOrder});
  for (const RawPiece& piece :
       plan_pieces(check_structure(gathered.tensors(), gathered.spec()), 16000)) {
    EXPECT_EQ(piece.rows, 512);
    EXPECT_LE(piece.columns, 128);
    EXPECT_GT(piece.table, 0);
  }
}

TEST(RawPiecesTest, RawBytesAreThoseOfTheTensors) {
  for (const PackCase& one : cases()) {
    std::size_t bytes = 0;
    for (const Layer& part : one.parts) {
      bytes += (part.qweight.size() + part.qzeros.size()) * 4 + part.scales.size();
    }
    const GptqTensors tensors = one.tensors();
    EXPECT_EQ(cuda::raw_bytes(check_structure(tensors, one.spec())),
              static_cast<std::int64_t>(bytes));
  }
}

// --- every byte ---

Bytes pack(const PackCase& one, std::int64_t target, bool backwards) {
  const GptqTensors tensors = one.tensors();
  const GptqWeights weights = validate(tensors, one.spec());
  const LayerPlan plan = plan_layer(weights);
  Bytes memory(static_cast<std::size_t>(plan.bytes), 0xCD);
  for (const SegmentPlan& s : plan.segments) {
    std::fill(memory.begin() + s.places.codes, memory.begin() + s.places.chunk_groups,
              static_cast<unsigned char>(0));
    const Bytes parts = host_parts(weights, s);
    std::copy(parts.begin(), parts.end(), memory.begin() + s.places.chunk_groups);
  }
  std::vector<RawPiece> pieces = plan_pieces(weights, target);
  if (backwards) std::reverse(pieces.begin(), pieces.end());
  for (const RawPiece& piece : pieces) {
    Bytes staged = stage(piece);
    const std::vector<std::int32_t>& raw_group = segment_of(plan, piece.module).raw_group;
    if (piece.table != 0) {
      std::memcpy(staged.data() + piece.table, raw_group.data(), raw_group.size() * 4);
    }
    test::pack_piece_on_host(place_piece(weights, plan, piece, staged.data(), memory.data()));
  }
  return memory;
}

TEST(Sm80PackTest, IsWhatTheLayoutSays) {
  for (const PackCase& one : cases()) {
    const Bytes expected = test::packed_by_definition(one.parts, {}, test::ScaleTypes::kOfFile);
    for (const std::int64_t target : {1, 3000, 20000, 1 << 30}) {
      ASSERT_TRUE(same(pack(one, target, false), expected)) << one.what << ", target " << target;
    }
    ASSERT_TRUE(same(pack(one, 1, true), expected)) << one.what << ", pieces backwards";
  }
}

TEST(Sm80PackTest, LargeLayers) {
  for (const PackCase& one : test::large_pack_cases()) {
    ASSERT_TRUE(same(pack(one, 1 << 20, false),
                     test::packed_by_definition(one.parts, {}, test::ScaleTypes::kOfFile)))
        << one.what;
  }
}

TEST(Sm80PackTest, EveryBFloat16ThatFloat16HoldsBecomesIt) {
  using cuda::sm80::has_as_half;
  EXPECT_TRUE(has_as_half(0x1p-17F, 0x1.fep15F));
  EXPECT_TRUE(has_as_half(0.0F, 0.0F));  // no scale but 0
  EXPECT_FALSE(has_as_half(0x1.fep-18F, 1.0F));
  EXPECT_FALSE(has_as_half(1.0F, 0x1p16F));
  int converted = 0;
  for (std::uint32_t bits = 0; bits < 1U << 16; ++bits) {
    const auto from = static_cast<std::uint16_t>(bits);
    const double value = test::read_element(&from, DType::kBFloat16, 0);
    const double magnitude = std::abs(value);
    if (value != 0.0 && !(magnitude >= 0x1p-17 && magnitude < 0x1p16)) continue;
    std::uint16_t half = 0;
    test::write_element(&half, DType::kFloat16, 0, value);
    ASSERT_EQ(test::read_element(&half, DType::kFloat16, 0), value) << value;
    ASSERT_EQ(cuda::sm80::bfloat16_as_half(from), half) << value;
    ++converted;
  }
  EXPECT_EQ(converted, 2 * (33 * 128 + 1));  // of either sign
}

TEST(Sm80PackTest, NeverTakesSomeRowsOfAnotherOrder) {
  const Layer layer = make_layer({.k = 256, .n = 8, .group_size = 32});
  GptqTensors tensors = layer.tensors();
  const GptqWeights weights = validate(tensors, layer.spec());
  LayerPlan plan = plan_layer(weights);
  plan.segments[0].identity = false;
  const RawPiece piece = plan_pieces(weights, 1000).front();
  test::expect_error(ErrorCode::kInternal, {"layer", "order is not plain"},
                     [&] { place_piece(weights, plan, piece, nullptr, nullptr); });
}

}  // namespace
}  // namespace marlinq
