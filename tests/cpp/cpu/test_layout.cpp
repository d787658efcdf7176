// The packed order, byte by byte, against an index-by-index definition written from the comment in
// layout.hpp; and back from the packed bytes to the checkpoint.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "core/marlin_linear.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/layout.hpp"
#include "cpu/packed.hpp"
#include "support/compare.hpp"

namespace marlinq {
namespace {

using cpu::Layout;
using cpu::PackedExpert;
using cpu::PackedExperts;
using cpu::PackedModule;
using test::Layer;
using test::LayerOptions;
using test::make_layer;
using test::Order;
using test::Zeros;

std::shared_ptr<const PackedExperts> pack(const std::vector<std::vector<Layer>>& experts,
                                          int threads = 2) {
  std::vector<GptqWeights> weights;
  for (const std::vector<Layer>& parts : experts) {
    weights.push_back(validate(test::fused(parts), parts.front().spec()));
  }
  CpuBackend::Context context(threads);
  return CpuBackend::pack(context, weights, {});
}

std::shared_ptr<const PackedExperts> pack(const Layer& layer, int threads = 2) {
  return pack(std::vector<std::vector<Layer>>{{layer}}, threads);
}

// Input row of each packed row: groups in order, rows of a group in order, padded to 8 with -1.
std::vector<std::int64_t> packed_rows(const Layer& layer) {
  std::vector<std::int64_t> rows;
  for (std::int64_t g = 0; g < layer.groups; ++g) {
    for (std::int64_t k = 0; k < layer.options.k; ++k) {
      if (layer.group_of_row[static_cast<std::size_t>(k)] == g) rows.push_back(k);
    }
    while (rows.size() % 8 != 0) rows.push_back(-1);
  }
  return rows;
}

struct Sections {
  std::vector<std::uint8_t> codes, scales, zeros;
  std::vector<float> bias;
};

Sections define(const Layer& layer) {
  const LayerOptions& o = layer.options;
  const std::vector<std::int64_t> rows = packed_rows(layer);
  const auto packed = static_cast<std::int64_t>(rows.size());
  const std::int64_t columns = (o.n + 15) / 16 * 16;
  const int width_bits = o.bits == 8 ? 8 : 4;
  const auto scale_size = static_cast<std::int64_t>(size_of(o.scales));
  Sections s;
  s.codes.assign(static_cast<std::size_t>(columns * packed * width_bits / 8), 0);
  s.scales.assign(static_cast<std::size_t>(columns * layer.groups * scale_size), 0);
  s.zeros.assign(static_cast<std::size_t>(columns * layer.groups * width_bits / 8), 0);
  s.bias.assign(static_cast<std::size_t>(columns), 0.0F);
  for (std::int64_t n = 0; n < o.n; ++n) {
    const std::int64_t block = n / 32;
    const std::int64_t width = std::min<std::int64_t>(32, columns - 32 * block);
    for (std::int64_t p = 0; p < packed; ++p) {
      const std::int64_t k = rows[static_cast<std::size_t>(p)];
      const std::uint32_t code =
          k < 0 ? 1U << (o.bits - 1) : layer.codes[static_cast<std::size_t>(k * o.n + n)];
      if (width_bits == 8) {
        const std::int64_t at = block * 32 * packed + p / 4 * width * 4 + n % 32 * 4 + p % 4;
        s.codes[static_cast<std::size_t>(at)] = static_cast<std::uint8_t>(code);
      } else {
        const std::int64_t in_dword = p % 8;
        const std::int64_t at =
            block * 32 * packed / 2 + p / 8 * width * 4 + n % 32 * 4 + in_dword % 4;
        s.codes[static_cast<std::size_t>(at)] |=
            static_cast<std::uint8_t>(in_dword < 4 ? code : code << 4);
      }
    }
    for (std::int64_t g = 0; g < layer.groups; ++g) {
      const std::int64_t at = block * 32 * layer.groups + g * width + n % 32;
      std::memcpy(s.scales.data() + at * scale_size,
                  layer.scales.data() + (g * o.n + n) * scale_size,
                  static_cast<std::size_t>(scale_size));
      const int zero = layer.zeros[static_cast<std::size_t>(g * o.n + n)];
      if (width_bits == 8) {
        s.zeros[static_cast<std::size_t>(at)] = static_cast<std::uint8_t>(zero);
      } else {
        s.zeros[static_cast<std::size_t>(at / 2)] |=
            static_cast<std::uint8_t>(n % 2 == 0 ? zero : zero << 4);
      }
    }
    if (o.bias) {
      s.bias[static_cast<std::size_t>(n)] =
          static_cast<float>(test::read_element(layer.bias.data(), *o.bias, n));
    }
  }
  return s;
}

template <class T>
::testing::AssertionResult section_is(const PackedExperts& packed, std::int64_t offset,
                                      const std::vector<T>& expected) {
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(expected.data());
  for (std::size_t i = 0; i < expected.size() * sizeof(T); ++i) {
    const std::uint8_t actual = packed.data()[static_cast<std::size_t>(offset) + i];
    if (actual != bytes[i]) {
      return ::testing::AssertionFailure()
             << "byte " << i << " is " << int{actual} << ", expected " << int{bytes[i]};
    }
  }
  return ::testing::AssertionSuccess();
}

void check_module(const PackedExperts& packed, const PackedModule& module, const Layer& layer,
                  bool zeros_kept) {
  const Sections expected = define(layer);
  EXPECT_TRUE(section_is(packed, module.codes, expected.codes)) << "codes";
  EXPECT_TRUE(section_is(packed, module.scales, expected.scales)) << "scales";
  ASSERT_EQ(module.zeros >= 0, zeros_kept);
  if (zeros_kept) {
    EXPECT_TRUE(section_is(packed, module.zeros, expected.zeros)) << "zeros";
  }
  ASSERT_EQ(module.bias >= 0, layer.options.bias.has_value());
  if (module.bias >= 0) {
    EXPECT_TRUE(section_is(packed, module.bias, expected.bias)) << "bias";
  }
}

// Reads every code, zero point and scale back through Layout's own offsets.
void check_round_trip(const PackedExperts& packed, const PackedModule& module, const Layer& layer) {
  const LayerOptions& o = layer.options;
  const Layout& layout = module.layout;
  const std::vector<std::int64_t> rows = packed_rows(layer);
  ASSERT_EQ(layout.packed_rows, static_cast<std::int64_t>(rows.size()));
  const int step = Layout::rows_per_dword(layout.code_bits);
  const std::uint32_t mask = (1U << layout.code_bits) - 1U;
  for (std::int64_t n = 0; n < o.n; ++n) {
    const std::int64_t block = n / Layout::kBlockColumns;
    const std::int64_t column = n % Layout::kBlockColumns;
    for (std::int64_t p = 0; p < layout.packed_rows; ++p) {
      const std::int64_t k = rows[static_cast<std::size_t>(p)];
      if (k < 0) continue;
      std::uint32_t word = 0;
      std::memcpy(&word,
                  packed.data() + module.codes + layout.code_offset(block) +
                      layout.row_offset(block, p / step * step) + column * 4,
                  4);
      ASSERT_EQ(word >> layout.bit_of_row(static_cast<int>(p % step)) & mask,
                layer.codes[static_cast<std::size_t>(k * o.n + n)])
          << "row " << k << ", column " << n;
    }
    for (std::int64_t g = 0; g < layer.groups; ++g) {
      const std::int64_t at = layout.group_offset(block) + g * layout.block_columns(block) + column;
      ASSERT_EQ(test::read_element(packed.data() + module.scales, o.scales, at),
                test::read_element(layer.scales.data(), o.scales, g * o.n + n));
      if (module.zeros >= 0) {
        const std::int64_t in_block = g * layout.block_columns(block) + column;
        const int place = layout.code_bits == 8 ? 0 : static_cast<int>(in_block % 2 * 4);
        const std::uint8_t byte =
            packed
                .data()[module.zeros + layout.zero_offset(block) + in_block * layout.code_bits / 8];
        ASSERT_EQ(byte >> place & mask, layer.zeros[static_cast<std::size_t>(g * o.n + n)]);
      }
    }
  }
}

std::vector<LayerOptions> layouts() {
  std::vector<LayerOptions> all;
  std::uint64_t seed = 0;
  for (const int bits : {2, 3, 4, 8}) {
    for (const std::int64_t n : {1, 15, 16, 17, 32, 33, 48, 49, 64, 100}) {
      for (const auto& [k, group] : std::vector<std::pair<std::int64_t, std::int64_t>>{
               {64, 32}, {64, -1}, {60, 16}, {100, 24}, {33, 7}, {1, 128}, {300, 256}}) {
        for (const Order order : {Order::kNone, Order::kActOrder, Order::kUnbalanced}) {
          const auto index = ++seed;
          all.push_back({.bits = bits,
                         .k = k,
                         .n = n,
                         .group_size = group,
                         .zeros = static_cast<Zeros>(index % 5),
                         .order = order,
                         .scales = static_cast<DType>(index % 3),
                         .bias = index % 2 == 0 ? std::optional(static_cast<DType>(index / 2 % 3))
                                                : std::nullopt,
                         .seed = index});
        }
      }
    }
  }
  return all;
}

TEST(LayoutTest, IsWhatTheCommentSays) {
  for (const LayerOptions& options : layouts()) {
    SCOPED_TRACE(describe(options));
    const Layer layer = make_layer(options);
    const auto packed = pack(layer);
    const PackedModule& module = packed->expert(0).modules[0];
    check_module(*packed, module, layer, is_asymmetric(options.zeros));
    check_round_trip(*packed, module, layer);
    if (HasFailure()) return;
  }
}

TEST(LayoutTest, SizesAddUp) {
  for (const int bits : {4, 8}) {
    for (const std::int64_t n : {1, 16, 17, 32, 47, 48, 49, 1000}) {
      const Layout layout{.code_bits = bits, .n = n, .packed_rows = 40, .groups = 3};
      std::int64_t columns = 0;
      for (std::int64_t b = 0; b < layout.blocks(); ++b) {
        EXPECT_EQ(layout.code_offset(b), columns * 40 * bits / 8);
        EXPECT_EQ(layout.group_offset(b), columns * 3);
        EXPECT_TRUE(layout.block_columns(b) == 16 || layout.block_columns(b) == 32);
        columns += layout.block_columns(b);
      }
      EXPECT_EQ(columns, layout.padded_columns());
      EXPECT_EQ(layout.code_bytes(), columns * 40 * bits / 8);
      EXPECT_EQ(layout.group_elements(), columns * 3);
      EXPECT_LT(layout.padded_columns() - n, 16);
    }
  }
}

std::vector<Layer> two_parts(std::uint64_t seed, Order order, Zeros zeros) {
  return {make_layer({.k = 96,
                      .n = 40,
                      .group_size = 32,
                      .zeros = zeros,
                      .order = order,
                      .bias = DType::kFloat16,
                      .seed = seed,
                      .name = "gate"}),
          make_layer({.k = 96,
                      .n = 24,
                      .group_size = 32,
                      .zeros = zeros,
                      .order = order,
                      .bias = DType::kFloat16,
                      .seed = seed + 100,
                      .name = "up"})};
}

TEST(LayoutTest, FusedModulesKeepTheirOwnOrder) {
  const std::vector<Layer> parts = two_parts(1, Order::kActOrder, Zeros::kAsymmetricV1);
  const auto packed = pack({parts});
  const PackedExpert& expert = packed->expert(0);
  ASSERT_EQ(expert.modules.size(), 2U);
  EXPECT_EQ(expert.orders.size(), 2U);
  EXPECT_EQ(expert.modules[1].first_column, 40);
  for (std::size_t i = 0; i < 2; ++i) {
    check_module(*packed, expert.modules[i], parts[i], true);
    check_round_trip(*packed, expert.modules[i], parts[i]);
  }
}

TEST(LayoutTest, FusedModulesOfOnePermutationShareIt) {
  std::vector<Layer> parts = two_parts(1, Order::kActOrder, Zeros::kSymmetricV1);
  parts[1].g_idx = parts[0].g_idx;
  EXPECT_EQ(pack({parts})->expert(0).orders.size(), 1U);
}

// --- stacks ---

std::vector<std::vector<Layer>> stack_of(Zeros zeros) {
  std::vector<std::vector<Layer>> experts;
  for (std::uint64_t e = 0; e < 5; ++e) {  // plain and act-order experts mixed
    experts.push_back(two_parts(10 + e, e % 2 == 0 ? Order::kActOrder : Order::kTrivial, zeros));
  }
  return experts;
}

TEST(StackLayoutTest, EachExpertIsContiguousAndEqualToItselfAlone) {
  for (const Zeros zeros : {Zeros::kSymmetricV1, Zeros::kAsymmetricV2, Zeros::kAbsent}) {
    const auto experts = stack_of(zeros);
    const auto packed = pack(experts);
    const std::uint8_t* next = packed->data();
    for (std::size_t e = 0; e < experts.size(); ++e) {
      const std::span<const std::uint8_t> mine = packed->bytes(static_cast<std::int64_t>(e));
      EXPECT_EQ(mine.data(), next) << "expert " << e << " does not follow the one before it";
      next = mine.data() + mine.size();
      const auto alone = pack({experts[e]});
      const std::span<const std::uint8_t> same = alone->bytes(0);
      ASSERT_EQ(mine.size(), same.size());
      EXPECT_EQ(std::memcmp(mine.data(), same.data(), mine.size()), 0) << "expert " << e;
    }
  }
}

TEST(StackLayoutTest, SectionsLieInsideTheirExpert) {
  const auto packed = pack(stack_of(Zeros::kAsymmetricV1));
  for (std::int64_t e = 0; e < packed->num_experts(); ++e) {
    const PackedExpert& expert = packed->expert(e);
    std::int64_t end = expert.begin;
    for (const PackedModule& module : expert.modules) {
      const auto scale_size =
          static_cast<std::int64_t>(module.scale_type == cpu::FloatType::kF32 ? 4 : 2);
      const std::vector<std::pair<std::int64_t, std::int64_t>> sections = {
          {module.codes, module.layout.code_bytes()},
          {module.scales, module.layout.group_elements() * scale_size},
          {module.zeros, module.layout.zero_bytes()},
          {module.bias, module.layout.padded_columns() * 4}};
      for (const auto& [begin, bytes] : sections) {
        EXPECT_GE(begin, end);
        EXPECT_EQ(begin % 64, 0) << "a vector must not cross a cache line";
        end = begin + bytes;
      }
    }
    EXPECT_LE(end, expert.begin + expert.bytes);
  }
}

// Where some experts are symmetric and some are not, all have the form of the others.
TEST(StackLayoutTest, MixedZeroPoints) {
  std::vector<std::vector<Layer>> experts;
  for (const Zeros zeros : {Zeros::kSymmetricV1, Zeros::kAsymmetricV1, Zeros::kSymmetricV2}) {
    experts.push_back({make_layer({.k = 64, .n = 40, .group_size = 16, .zeros = zeros})});
  }
  const auto packed = pack(experts);
  for (std::size_t e = 0; e < experts.size(); ++e) {
    const auto index = static_cast<std::int64_t>(e);
    check_module(*packed, packed->expert(index).modules[0], experts[e][0], true);
    EXPECT_EQ(packed->bytes(index).size(), packed->bytes(0).size());
  }
}

TEST(StackLayoutTest, BytesDoNotDependOnThreads) {
  const auto experts = stack_of(Zeros::kAsymmetricV1);
  const auto one = pack(experts, 1);
  for (const int threads : {2, 3, 8}) {
    const auto many = pack(experts, threads);
    for (std::int64_t e = 0; e < one->num_experts(); ++e) {
      const auto a = one->bytes(e);
      const auto b = many->bytes(e);
      ASSERT_EQ(a.size(), b.size());
      EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size()), 0);
    }
  }
}

// One order for all: what is packed does not depend on the kernel that will run it.
TEST(StackLayoutTest, BytesDoNotDependOnTheKernel) {
  const Layer layer = make_layer({.k = 96, .n = 40, .group_size = 32, .order = Order::kActOrder});
  const GptqWeights weights = validate(layer.tensors(), layer.spec());
  const auto first =
      cpu::pack_experts({&weights, 1}, *cpu::isa_kernels().front(), Compute::kInt16, 1);
  const auto last =
      cpu::pack_experts({&weights, 1}, *cpu::isa_kernels().back(), Compute::kFloat32, 1);
  ASSERT_EQ(first->bytes(0).size(), last->bytes(0).size());
  EXPECT_EQ(std::memcmp(first->data(), last->data(), first->bytes(0).size()), 0);
}

// --- size ---

// Bytes of a loaded layer over those of its tensors. They follow from the shapes: codes are all 0.
double bytes_ratio(const LayerOptions& options) {
  static const std::vector<std::uint8_t> zero_bytes(8 << 20);
  Layer layer;
  layer.options = options;
  layer.groups = options.group_size == -1 ? 1 : test::divide_up(options.k, options.group_size);
  GptqModule module = layer.module();
  for (HostTensor* tensor : {&module.qweight, &module.scales, &module.qzeros}) {
    if (!tensor->present()) continue;
    tensor->data = zero_bytes.data();
    tensor->bytes =
        static_cast<std::size_t>(tensor->shape[0] * tensor->shape[1]) * size_of(tensor->dtype);
  }
  const std::uint32_t mask = (1U << options.bits) - 1U;
  const std::vector<std::uint32_t> symmetric(
      module.qzeros.bytes / 4, ((1U << (options.bits - 1)) - 1U) * (0xFFFFFFFFU / mask));
  if (options.zeros == Zeros::kSymmetricV1) module.qzeros.data = symmetric.data();
  std::vector<std::int32_t> g_idx;
  const std::int64_t group_size = options.group_size == -1 ? options.k : options.group_size;
  for (std::int64_t i = 0; i < options.k; ++i) {  // rows backwards: the groups keep their sizes
    g_idx.push_back(static_cast<std::int32_t>((options.k - 1 - i) / group_size));
  }
  if (options.order != Order::kNone) {
    module.g_idx.data = g_idx.data();
    module.g_idx.bytes = g_idx.size() * 4;
  }
  CpuBackend::Context context(2);
  const Description d = CpuBackend::load_gptq(context, module, layer.spec())->describe();
  EXPECT_EQ(d.symmetric, !is_asymmetric(options.zeros));
  return static_cast<double>(d.packed_bytes) / static_cast<double>(d.checkpoint_bytes);
}

void expect_at_most_a_tenth_more(const std::vector<std::int64_t>& ns,
                                 const std::vector<std::int64_t>& ks) {
  for (const int bits : {4, 8}) {
    for (const std::int64_t n : ns) {
      for (const std::int64_t k : ks) {
        for (const std::int64_t group : {-1, 16, 32, 64, 128, 256, 1024}) {
          for (const Zeros zeros : {Zeros::kAbsent, Zeros::kSymmetricV1, Zeros::kAsymmetricV1}) {
            for (const Order order : {Order::kNone, Order::kActOrder}) {
              for (const DType scales : {DType::kFloat16, DType::kFloat32}) {
                const LayerOptions options{.bits = bits,
                                           .k = k,
                                           .n = n,
                                           .group_size = group,
                                           .zeros = zeros,
                                           .order = order,
                                           .scales = scales};
                EXPECT_LE(bytes_ratio(options), 1.10) << describe(options);
              }
            }
          }
        }
      }
    }
  }
}

TEST(PackedSizeTest, AtMostATenthMoreThanTheCheckpoint) {
  expect_at_most_a_tenth_more({256, 320, 576, 1408}, {256, 257, 320, 704});
}

// One column more than whole vectors: the most padding there is.
TEST(PackedSizeTest, AtMostATenthMoreThanTheCheckpointWithOneColumnTooMany) {
  expect_at_most_a_tenth_more({257, 321, 577}, {256, 257, 704});
}

}  // namespace
}  // namespace marlinq
