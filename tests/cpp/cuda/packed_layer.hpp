// The bytes that a packed layer must have, element by element from the picture in
// cuda/arch/sm80/layout.hpp, and the layers that are packed to be compared with them. Shares no code
// with the packing: it starts from codes, zero points and groups as they were drawn.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "support/generators.hpp"

namespace marlinq::test {

/// The memory of fused modules, segment after segment: codes, groups, chunk_groups, source (unless
/// the order is plain) and bias (if some module has one), each at a multiple of 256.
/// An expert of a stack also has what the others need.
struct StackNeeds {
  bool zeros = false;   // zero points
  bool source = false;  // a row order
};
/// Scales of bfloat16 that float16 can all hold are float16, once the layer is loaded.
enum class ScaleTypes { kLoaded, kOfFile };
std::vector<unsigned char> packed_by_definition(const std::vector<Layer>& parts,
                                                const StackNeeds& needs = {},
                                                ScaleTypes types = ScaleTypes::kLoaded);

/// Where the code of a feature and a packed row is: a word of the segment's codes, and its bits, the lowest first.
struct CodePlace {
  std::int64_t word;
  std::vector<int> bits;
  /// What they hold: the code q; or the magnitude and sign of q - 7.5, 0 to 7 for 8 to 15, with the last bit set 7 to 0
  /// for 0 to 7.
  bool centred = false;

  std::uint32_t word_of(std::uint32_t code) const;
  std::uint32_t code_in(std::uint32_t word) const;
};
CodePlace code_place(std::int64_t feature, std::int64_t packed_row, std::int64_t chunks, int bits);

/// Names the first byte that differs.
::testing::AssertionResult same(const std::vector<unsigned char>& actual,
                                const std::vector<unsigned char>& expected);

/// A layer to pack: modules that are fused along N, and how the configuration labels them.
struct PackCase {
  std::string what;
  std::vector<Layer> parts;

  GptqTensors tensors() const { return fused(parts); }
  GptqSpec spec() const;
};

/// Every pair of bits, zero points, group size, order of rows, scale dtype, N, K, bias and way of
/// fusing occurs; every third case has scales of 0.
std::vector<PackCase> pack_cases();

/// Layers of some megabytes, which come in more than one piece of the usual size: by rows, by
/// columns, of three modules, of every width.
std::vector<PackCase> large_pack_cases();

}  // namespace marlinq::test
