#include "cuda/packed_layer.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <set>
#include <utility>

namespace marlinq::test {
namespace {

using Bytes = std::vector<unsigned char>;

std::int64_t up(std::int64_t value, std::int64_t multiple) {
  return divide_up(value, multiple) * multiple;
}

template <class T>
void append(Bytes& memory, const std::vector<T>& values) {
  const std::size_t at = memory.size();
  const auto bytes = static_cast<std::int64_t>(values.size() * sizeof(T));
  memory.resize(at + static_cast<std::size_t>(up(bytes, 256)));
  std::memcpy(memory.data() + at, values.data(), values.size() * sizeof(T));
}

// Rows of one group after another, each group filled up to 16 rows, all of them to 64.
struct Rows {
  std::vector<std::int32_t> input;  // -1: padding
  std::vector<std::int64_t> group;  // of the checkpoint
  std::vector<std::int64_t> groups;

  explicit Rows(const Layer& layer) {
    for (std::int64_t g = 0; g < layer.groups; ++g) {
      const std::size_t before = input.size();
      for (std::int64_t k = 0; k < layer.options.k; ++k) {
        if (layer.group_of_row[static_cast<std::size_t>(k)] == g) {
          input.push_back(static_cast<std::int32_t>(k));
        }
      }
      if (input.size() == before) continue;
      groups.push_back(g);
      while (input.size() % 16 != 0) input.push_back(-1);
      group.resize(input.size(), g);
    }
    while (input.size() % 64 != 0) input.push_back(-1);
    group.resize(input.size(), groups.back());
  }

  bool plain(std::int64_t k) const {
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(input.size()); ++i) {
      if (input[static_cast<std::size_t>(i)] != (i < k ? i : -1)) return false;
    }
    return true;
  }
  std::int64_t number_of(std::int64_t checkpoint_group) const {
    return std::find(groups.begin(), groups.end(), checkpoint_group) - groups.begin();
  }
};

// A feature of a segment: a column of one of its modules.
struct Feature {
  const Layer* layer = nullptr;
  std::int64_t column = 0;

  std::size_t at(std::int64_t row) const {
    return static_cast<std::size_t>(row * layer->options.n + column);
  }
  double scale(std::int64_t group) const {
    return read_element(layer->scales.data(), layer->options.scales,
                        static_cast<std::int64_t>(at(group)));
  }
  // What stands for the code of a row in the packed weight.
  std::uint32_t code(const Rows& rows, std::size_t packed) const {
    const std::int64_t group = rows.group[packed];
    const bool counts = rows.input[packed] >= 0 && scale(group) != 0.0;
    return counts ? layer->codes[at(rows.input[packed])] : layer->zeros[at(group)];
  }
};

std::vector<std::uint32_t> codes(const std::vector<Feature>& features, const Rows& rows, int bits) {
  const auto n = static_cast<std::int64_t>(features.size());
  const auto k = static_cast<std::int64_t>(rows.input.size());
  std::vector<std::uint32_t> words(
      static_cast<std::size_t>(up(n, 64) / 16 * (k / 64) * (bits == 8 ? 256 : 128)));
  for (std::int64_t f = 0; f < n; ++f) {
    for (std::int64_t r = 0; r < k; ++r) {
      const CodePlace place = code_place(f, r, k / 64, bits);
      words[static_cast<std::size_t>(place.word)] |= place.word_of(
          features[static_cast<std::size_t>(f)].code(rows, static_cast<std::size_t>(r)));
    }
  }
  return words;
}

Bytes records(const std::vector<Feature>& features, const Rows& rows, DType scales, bool zeros) {
  const auto n = static_cast<std::int64_t>(features.size());
  const auto groups = static_cast<std::int64_t>(rows.groups.size());
  const auto size = static_cast<std::int64_t>(size_of(scales));
  const std::int64_t record = 16 * size + (zeros ? 16 : 0);
  Bytes bytes(static_cast<std::size_t>(up(n, 64) / 16 * groups * record));
  for (std::int64_t f = 0; f < n; ++f) {
    const Feature& feature = features[static_cast<std::size_t>(f)];
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t group = rows.groups[static_cast<std::size_t>(g)];
      unsigned char* target = bytes.data() + ((f / 64 * groups + g) * 4 + f % 64 / 16) * record;
      const std::int64_t place = f % 8 * 2 + f % 16 / 8;
      const double scale = feature.scale(group);
      write_element(target, scales, place, scale == 0.0 ? 1.0 : scale);
      if (zeros) {
        target[16 * size + place] =
            static_cast<unsigned char>(feature.layer->zeros[feature.at(group)]);
      }
    }
  }
  return bytes;
}

// Whether float16 can hold all scales of bfloat16, which have 8 significant bits.
bool fit_halves(const std::vector<Feature>& features) {
  return std::ranges::all_of(features, [](const Feature& feature) {
    for (std::int64_t group = 0; group < feature.layer->groups; ++group) {
      const double scale = std::abs(feature.scale(group));
      if (scale != 0.0 && (scale < 0x1p-17 || scale > 65504.0)) return false;
    }
    return true;
  });
}

std::vector<std::int32_t> chunk_groups(const Rows& rows) {
  std::vector<std::int32_t> words;
  for (std::size_t first = 0; first < rows.group.size(); first += 64) {
    auto word = static_cast<std::int32_t>(rows.number_of(rows.group[first]) * 16);
    for (std::size_t step = 1; step < 4; ++step) {
      const std::size_t row = first + 16 * step;
      if (rows.group[row] != rows.group[row - 1]) word += 1 << step;
    }
    words.push_back(word);
  }
  return words;
}

std::vector<int> run_of_bits(int first, int count) {
  std::vector<int> bits(static_cast<std::size_t>(count));
  std::iota(bits.begin(), bits.end(), first);
  return bits;
}

}  // namespace

CodePlace code_place(std::int64_t f, std::int64_t r, std::int64_t chunks, int bits) {
  const std::int64_t words_of_strip = bits == 8 ? 256 : 128;  // and chunk
  const std::int64_t block = f / 64;
  const std::int64_t strip = f % 64 / 16;
  const std::int64_t upper = f % 16 / 8;  // feature g + 8
  const std::int64_t chunk = r / 64;
  const std::int64_t row = r % 16;
  const std::int64_t far = row / 8;  // rows 2t + 8, 2t + 9
  const std::int64_t odd = row % 2;
  const std::int64_t lane = f % 8 * 4 + row % 8 / 2;
  const std::int64_t first = ((block * chunks + chunk) * 4 + strip) * words_of_strip;
  if (bits == 8) {
    const std::int64_t piece = r % 64 / 32;
    return {.word = first + (piece * 32 + lane) * 4 + r % 32 / 16 * 2 + far,
            .bits = run_of_bits(static_cast<int>(8 * (2 * upper + odd)), 8)};
  }
  const auto bit = static_cast<int>(8 * far + 16 * odd);
  CodePlace place{.word = first + lane * 4 + r % 64 / 16, .bits = {}};
  if (upper == 0) {
    place.bits = run_of_bits(bit, 4);
  } else {
    place.centred = true;
    place.bits = {bit + 4, bit + 5, bit + 6, (bit + 15) % 32};
  }
  return place;
}

std::uint32_t CodePlace::word_of(std::uint32_t code) const {
  const std::uint32_t stored = !centred ? code : code < 8 ? 15 - code : code - 8;
  std::uint32_t result = 0;
  for (std::size_t i = 0; i < bits.size(); ++i) result |= (stored >> i & 1U) << bits[i];
  return result;
}

std::uint32_t CodePlace::code_in(std::uint32_t value) const {
  std::uint32_t stored = 0;
  for (std::size_t i = 0; i < bits.size(); ++i) stored |= (value >> bits[i] & 1U) << i;
  return !centred ? stored : stored < 8 ? stored + 8 : 15 - stored;
}

std::vector<unsigned char> packed_by_definition(const std::vector<Layer>& parts,
                                                const StackNeeds& needs, ScaleTypes types) {
  Bytes memory;
  for (std::size_t first = 0; first < parts.size();) {
    const Layer& model = parts[first];
    std::size_t end = first + 1;
    while (end < parts.size() && parts[end].group_of_row == model.group_of_row &&
           parts[end].options.scales == model.options.scales) {
      ++end;
    }
    std::vector<Feature> features;
    std::vector<float> bias;
    bool zeros = needs.zeros;
    bool biased = false;
    for (std::size_t i = first; i < end; ++i) {
      const Layer& part = parts[i];
      zeros = zeros || is_asymmetric(part.options.zeros);
      biased = biased || part.options.bias;
      for (std::int64_t column = 0; column < part.options.n; ++column) {
        features.push_back({.layer = &part, .column = column});
        bias.push_back(part.options.bias ? static_cast<float>(read_element(
                                               part.bias.data(), *part.options.bias, column))
                                         : 0.0F);
      }
    }
    const Rows rows(model);
    append(memory, codes(features, rows, model.options.bits));
    const bool as_halves = types == ScaleTypes::kLoaded &&
                           model.options.scales == DType::kBFloat16 && fit_halves(features);
    append(memory,
           records(features, rows, as_halves ? DType::kFloat16 : model.options.scales, zeros));
    append(memory, chunk_groups(rows));
    if (needs.source || !rows.plain(model.options.k)) append(memory, rows.input);
    if (biased) append(memory, bias);
    first = end;
  }
  return memory;
}

GptqSpec PackCase::spec() const {
  GptqSpec spec = parts.front().spec();
  // Modules of either kind in one layer: what a single zero point says of its convention may be wrong.
  for (const Layer& part : parts) {
    if (is_asymmetric(part.options.zeros) != is_asymmetric(parts.front().options.zeros)) {
      spec.symmetry = Symmetry::kUnknown;
      spec.zero_points = parts.front().convention();
    }
  }
  return spec;
}

namespace {

// Scales of 0, some of them negative zeros, in whole groups of a column and in whole columns.
void put_zero_scales(Layer& layer, std::uint64_t seed) {
  Random random(seed);
  const std::int64_t count = layer.groups * layer.options.n;
  for (std::int64_t i = 0; i < count; ++i) {
    const bool column = i % layer.options.n % 13 == 5;
    if (column || random.chance(15)) {
      write_element(layer.scales.data(), layer.options.scales, i, random.chance(30) ? -0.0 : 0.0);
    }
  }
}

enum class Fusing { kNone, kSameOrder, kOwnOrders, kMixedScales, kMixedZeros, kFour };

Zeros other_zeros(Zeros zeros) {
  // Of the same convention, so that one label serves both.
  switch (zeros) {
    case Zeros::kAbsent:
    case Zeros::kSymmetricV1:
      return Zeros::kAsymmetricV1;
    case Zeros::kSymmetricV2:
      return Zeros::kAsymmetricV2;
    case Zeros::kAsymmetricV1:
      return Zeros::kSymmetricV1;
    default:
      return Zeros::kSymmetricV2;
  }
}

std::vector<Layer> fuse_parts(LayerOptions options, Fusing fusing) {
  const std::uint64_t seed = options.seed;
  std::vector<Layer> parts = {make_layer(options)};
  const auto add = [&](std::int64_t n, const auto& change) {
    LayerOptions other = options;
    other.n = n;
    other.seed = seed + 1000 * parts.size();
    other.name = options.name + std::to_string(parts.size());
    change(other);
    parts.push_back(make_layer(other));
  };
  const auto same_order = [&] {  // one permutation for the last module too
    Layer& last = parts.back();
    last.group_of_row = parts.front().group_of_row;
    last.g_idx = parts.front().g_idx;
  };
  switch (fusing) {
    case Fusing::kNone:
      break;
    case Fusing::kSameOrder:
      add(options.n / 2 + 1, [](LayerOptions&) {});
      same_order();
      break;
    case Fusing::kOwnOrders:
      add(options.n + 5, [](LayerOptions&) {});
      break;
    case Fusing::kMixedScales:
      add(24, [](LayerOptions& o) {
        o.scales = o.scales == DType::kFloat32 ? DType::kBFloat16 : DType::kFloat32;
        o.bias = DType::kFloat32;
      });
      same_order();
      break;
    case Fusing::kMixedZeros:
      add(40, [](LayerOptions& o) {
        o.zeros = other_zeros(o.zeros);
        o.bias = o.bias ? std::nullopt : std::optional(DType::kBFloat16);
      });
      same_order();
      break;
    case Fusing::kFour:  // meet inside a strip, inside a block, and at a block's end
      add(3, [](LayerOptions&) {});
      same_order();
      add(64 - (options.n + 3) % 64, [](LayerOptions&) {});
      same_order();
      add(70, [](LayerOptions&) {});
      break;
  }
  return parts;
}

}  // namespace

std::vector<PackCase> pack_cases() {
  const std::vector<int> bits = {2, 3, 4, 8};
  const std::vector<Zeros> zeros = {Zeros::kAbsent, Zeros::kSymmetricV1, Zeros::kSymmetricV2,
                                    Zeros::kAsymmetricV1, Zeros::kAsymmetricV2};
  const std::vector<std::int64_t> groups = {-1, 16, 24, 32, 48, 64, 128, 1024};
  const std::vector<Order> orders = {Order::kNone, Order::kTrivial, Order::kActOrder,
                                     Order::kUnbalanced, Order::kNegative};
  const std::vector<DType> scales = {DType::kFloat16, DType::kBFloat16, DType::kFloat32};
  const std::vector<std::int64_t> ns = {1, 7, 16, 31, 64, 65, 130, 200};
  const std::vector<std::int64_t> ks = {1, 15, 33, 64, 100, 192, 257, 1040};
  const std::vector<std::optional<DType>> biases = {std::nullopt, DType::kFloat16, DType::kBFloat16,
                                                    DType::kFloat32};
  const std::vector<Fusing> fusings = {Fusing::kNone,       Fusing::kSameOrder,
                                       Fusing::kOwnOrders,  Fusing::kMixedScales,
                                       Fusing::kMixedZeros, Fusing::kFour};
  const auto size = [](const auto& values) { return static_cast<int>(values.size()); };
  std::vector<PackCase> cases;
  const std::vector<int> sizes = {size(bits), size(zeros), size(groups), size(orders), size(scales),
                                  size(ns),   size(ks),    size(biases), size(fusings)};
  std::vector<std::vector<int>> rows;
  for (const std::uint64_t seed : {7U, 8U}) {
    for (std::vector<int>& row : pairwise_cover(sizes, seed)) rows.push_back(std::move(row));
  }
  for (const std::vector<int>& row : rows) {
    const auto pick = [&row](const auto& values, std::size_t axis) {
      return values[static_cast<std::size_t>(row[axis])];
    };
    const LayerOptions options{.bits = pick(bits, 0),
                               .k = pick(ks, 6),
                               .n = pick(ns, 5),
                               .group_size = pick(groups, 2),
                               .zeros = pick(zeros, 1),
                               .order = pick(orders, 3),
                               .scales = pick(scales, 4),
                               .bias = pick(biases, 7),
                               .seed = cases.size() + 1};
    const Fusing fusing = pick(fusings, 8);
    PackCase one{.what = describe(options) + ", fusing " + std::to_string(static_cast<int>(fusing)),
                 .parts = fuse_parts(options, fusing)};
    if (cases.size() % 3 == 2) {
      one.what += ", scales of 0";
      for (Layer& part : one.parts) put_zero_scales(part, options.seed);
    }
    cases.push_back(std::move(one));
  }
  return cases;
}

std::vector<PackCase> large_pack_cases() {
  std::vector<PackCase> cases;
  const auto add = [&cases](const LayerOptions& options, Fusing fusing) {
    cases.push_back({.what = describe(options), .parts = fuse_parts(options, fusing)});
  };
  add({.bits = 4, .k = 2048, .n = 3000, .zeros = Zeros::kAsymmetricV1}, Fusing::kNone);
  add({.bits = 4, .k = 1500, .n = 2100, .group_size = 32, .order = Order::kActOrder},
      Fusing::kOwnOrders);
  add({.bits = 8,
       .k = 1024,
       .n = 2000,
       .zeros = Zeros::kAbsent,
       .order = Order::kUnbalanced,
       .scales = DType::kBFloat16,
       .bias = DType::kFloat16},
      Fusing::kFour);
  add({.bits = 3,
       .k = 2080,
       .n = 2500,
       .group_size = -1,
       .zeros = Zeros::kAsymmetricV2,
       .scales = DType::kFloat32},
      Fusing::kMixedScales);
  add({.bits = 2, .k = 4000, .n = 2500, .group_size = 24, .zeros = Zeros::kSymmetricV2},
      Fusing::kSameOrder);
  return cases;
}

::testing::AssertionResult same(const std::vector<unsigned char>& actual,
                                const std::vector<unsigned char>& expected) {
  if (actual.size() != expected.size()) {
    return ::testing::AssertionFailure() << actual.size() << " bytes, not " << expected.size();
  }
  const auto [a, b] = std::mismatch(actual.begin(), actual.end(), expected.begin());
  if (a == actual.end()) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "byte " << a - actual.begin() << " of " << actual.size()
                                       << " is " << int{*a} << ", not " << int{*b};
}

}  // namespace marlinq::test
