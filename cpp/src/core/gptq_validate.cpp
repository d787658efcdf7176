// Every check of a GPTQ layer, and the decision which zero-point convention its file follows.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <string_view>

#include "core/codes.hpp"
#include "core/concat.hpp"
#include "core/elements.hpp"
#include "core/gptq_checks.hpp"
#include "core/half.hpp"
#include "core/integers.hpp"
#include "core/refuse.hpp"
#include "marlinq/error.hpp"
#include "marlinq/gptq.hpp"

namespace marlinq {
namespace {

// Row and column indices are 32-bit in the packed weight's tables, and groups are padded there: one row
// may take 16.
constexpr std::int64_t kMaxExtent = std::numeric_limits<std::int32_t>::max() / 16;

std::string shape_of(const HostTensor& tensor) {
  std::string text = "[";
  for (int i = 0; i < tensor.rank; ++i) text += concat(i > 0 ? ", " : "", tensor.shape[i]);
  return text + "]";
}

// The largest magnitude in an array of floats, and the least that is not 0, as bits without the
// sign: their order is that of the numbers, with infinities and NaNs on top. `least_below` is less
// by 1, so that a magnitude of 0 counts as the largest. Signed, and at most as wide as the numbers
// themselves, so that every instruction set compares many at once; in lanes, so that compilers do
// that without being asked to try hard.
template <class Bits>
struct Magnitudes {
  static constexpr Bits kMask = std::numeric_limits<Bits>::max();
  Bits most = 0;
  Bits least_below = kMask;
};

template <class Bits>
Magnitudes<Bits> magnitudes(const std::uint8_t* data, std::int64_t count) {
  constexpr Bits kMask = Magnitudes<Bits>::kMask;
  constexpr std::int64_t kLanes = 64 / sizeof(Bits);
  constexpr std::int64_t kAhead = 4096;  // bytes
  std::array<Bits, kLanes> most;
  std::array<Bits, kLanes> least_below;
  most.fill(0);
  least_below.fill(kMask);
  const auto look = [&](std::int64_t first, std::int64_t lanes) {
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
      const auto at = static_cast<std::size_t>(lane);
      Bits bits = 0;
      std::memcpy(&bits, data + (first + lane) * std::int64_t{sizeof bits}, sizeof bits);
      const auto size = static_cast<Bits>(bits & kMask);
      const auto below = static_cast<Bits>((static_cast<std::uint32_t>(size) - 1U) & kMask);
      most[at] = std::max(most[at], size);
      least_below[at] = std::min(least_below[at], below);
    }
  };
  std::int64_t first = 0;
  for (; first + kLanes <= count; first += kLanes) {
    // From memory, page after page: no processor goes ahead into the next page by itself.
    __builtin_prefetch(data + first * std::int64_t{sizeof(Bits)} + kAhead);
    look(first, kLanes);
  }
  look(first, count - first);
  return {.most = *std::max_element(most.begin(), most.end()),
          .least_below = *std::min_element(least_below.begin(), least_below.end())};
}

struct FloatRange {
  float least = 0;  // magnitude that is not 0; 0: there is none
  float most = 0;
};

template <class Bits>
FloatRange range_of(const HostTensor& tensor, std::int64_t first, std::int64_t count) {
  const auto found = magnitudes<Bits>(
      static_cast<const std::uint8_t*>(tensor.data) + first * std::int64_t{sizeof(Bits)}, count);
  const auto value = [&](Bits bits) {
    if constexpr (sizeof bits == 4) {
      return std::bit_cast<float>(bits);
    } else {
      const auto half = static_cast<std::uint16_t>(bits);
      return tensor.dtype == DType::kFloat16 ? float16_to_float(half) : bfloat16_to_float(half);
    }
  };
  return {.least = found.most == 0 ? 0.0F : value(static_cast<Bits>(found.least_below + 1)),
          .most = value(found.most)};
}

class ModuleChecker {
 public:
  ModuleChecker(const GptqModule& module, const GptqSpec& spec) : module_(module), spec_(spec) {}

  std::int64_t input_features() const {
    if (spec_.k > 0) return spec_.k;
    if (module_.g_idx.present()) return module_.g_idx.shape[0];
    return module_.qweight.shape[0] * 32 / spec_.bits;
  }

  ValidatedModule check_structure(GptqWeights& layer) const {
    const HostTensor& qweight = module_.qweight;
    require(qweight, "qweight");
    require(module_.scales, "scales");
    expect_dtype(qweight, "qweight", false);
    expect_rank(qweight, "qweight", 2, "[ceil(k * bits / 32), n]");
    if (module_.g_idx.present()) {
      expect_dtype(module_.g_idx, "g_idx", false);
      expect_rank(module_.g_idx, "g_idx", 1, "[k]");
    }

    if (qweight.shape[0] < 1 || qweight.shape[0] > kMaxExtent) {
      refuse_argument(concat(tensor_name("qweight"), ": shape ", shape_of(qweight),
                             ", expected 1 to ", kMaxExtent, " rows of words"));
    }
    const std::int64_t k = input_features();
    const std::int64_t n = qweight.shape[1];
    if (k < 1 || k > kMaxExtent) {
      refuse_argument(concat(tensor_name("qweight"), ": k = ", k, " input features, expected 1 to ",
                             kMaxExtent));
    }
    if (n < 1 || n > kMaxExtent) {
      refuse_argument(concat(tensor_name("qweight"), ": n = ", n,
                             " output features, expected 1 to ", kMaxExtent));
    }
    const std::int64_t group_size = spec_.group_size == -1 ? k : spec_.group_size;
    const std::int64_t groups = ceil_div(k, group_size);
    expect_shape(qweight, "qweight", "[ceil(k * bits / 32), n]", {packed_words(k, spec_.bits), n});
    expect_dtype(module_.scales, "scales", true);
    expect_rank(module_.scales, "scales", 2, "[ceil(k / group_size), n]");
    expect_shape(module_.scales, "scales", "[ceil(k / group_size), n]", {groups, n});

    ValidatedModule checked;
    checked.name = module_.name;
    checked.n = n;
    checked.qweight = bytes_of(qweight);
    checked.scales = bytes_of(module_.scales);
    checked.scale_dtype = module_.scales.dtype;
    if (module_.qzeros.present()) {
      constexpr std::string_view kShape = "[ceil(k / group_size), ceil(n * bits / 32)]";
      expect_dtype(module_.qzeros, "qzeros", false);
      expect_rank(module_.qzeros, "qzeros", 2, kShape);
      expect_shape(module_.qzeros, "qzeros", kShape, {groups, packed_words(n, spec_.bits)});
      checked.qzeros = bytes_of(module_.qzeros);
    }
    if (module_.bias.present()) {
      expect_dtype(module_.bias, "bias", true);
      expect_rank(module_.bias, "bias", 1, "[n]");
      expect_shape(module_.bias, "bias", "[n]", {n});
      checked.bias = bytes_of(module_.bias);
      checked.bias_dtype = module_.bias.dtype;
    }
    read_groups(checked, k, group_size, groups);
    for (const HostTensor* tensor :
         {&qweight, &module_.scales, &module_.qzeros, &module_.g_idx, &module_.bias}) {
      if (tensor->present()) checked.bytes += tensor->bytes;
    }
    layer.k = k;
    layer.group_size = group_size;
    layer.groups = groups;
    return checked;
  }

  void check_scales(ValidatedModule& checked, std::int64_t first, std::int64_t count) const {
    const FloatRange scales = check_finite(module_.scales, "scales", first, count);
    if (scales.most == 0.0F) return;
    checked.least_scale =
        checked.most_scale == 0.0F ? scales.least : std::min(checked.least_scale, scales.least);
    checked.most_scale = std::max(checked.most_scale, scales.most);
  }

  void check_bias() const {
    if (module_.bias.present()) check_finite(module_.bias, "bias", 0, module_.bias.shape[0]);
  }

  void check_zero_points(GptqWeights& layer, ValidatedModule& checked) const {
    decide_zero_points(checked, layer.groups);
    if (std::optional<std::string> warning = lost_zero_points(checked, layer.groups)) {
      layer.warnings.push_back(*std::move(warning));
    }
  }

 private:
  std::string tensor_name(std::string_view tensor) const {
    return module_.name.empty() ? std::string(tensor) : concat(module_.name, ".", tensor);
  }

  static const std::uint8_t* bytes_of(const HostTensor& tensor) {
    return static_cast<const std::uint8_t*>(tensor.data);
  }

  void require(const HostTensor& tensor, std::string_view name) const {
    if (!tensor.present()) refuse_argument(concat(tensor_name(name), ": missing"));
  }

  void expect_dtype(const HostTensor& tensor, std::string_view name, bool floating) const {
    if (floating ? !is_floating(tensor.dtype) : tensor.dtype != DType::kInt32) {
      refuse_argument(concat(tensor_name(name), ": dtype ", to_string(tensor.dtype), ", expected ",
                             floating ? "float32, float16 or bfloat16" : "int32"));
    }
  }

  void expect_rank(const HostTensor& tensor, std::string_view name, int rank,
                   std::string_view meaning) const {
    if (tensor.rank != rank) {
      refuse_argument(concat(tensor_name(name), ": ", tensor.rank, " dimensions, expected ", rank,
                             ", ", meaning));
    }
  }

  void expect_shape(const HostTensor& tensor, std::string_view name, std::string_view meaning,
                    std::initializer_list<std::int64_t> expected) const {
    bool same = true;
    std::size_t elements = 1;
    std::string text = "[";
    int axis = 0;
    for (const std::int64_t extent : expected) {
      same = same && tensor.shape[static_cast<std::size_t>(axis)] == extent;
      text += concat(axis > 0 ? ", " : "", extent);
      elements *= static_cast<std::size_t>(extent);
      ++axis;
    }
    if (!same) {
      refuse_argument(concat(tensor_name(name), ": shape ", shape_of(tensor), ", expected ",
                             meaning, " = ", text, "] (k = ", input_features(),
                             ", bits = ", spec_.bits, ", group_size = ", spec_.group_size, ")"));
    }
    if (tensor.data == nullptr || tensor.bytes != elements * size_of(tensor.dtype)) {
      refuse_argument(concat(tensor_name(name), ": ", tensor.data == nullptr ? 0 : tensor.bytes,
                             " bytes, expected ", elements * size_of(tensor.dtype), " for shape ",
                             shape_of(tensor)));
    }
  }

  FloatRange check_finite(const HostTensor& tensor, std::string_view name, std::int64_t first,
                          std::int64_t count) const {
    const FloatRange range = tensor.dtype == DType::kFloat32
                                 ? range_of<std::int32_t>(tensor, first, count)
                                 : range_of<std::int16_t>(tensor, first, count);
    if (std::isfinite(range.most)) return range;
    std::int64_t i = first;
    while (i < first + count - 1 && std::isfinite(read_float(tensor.data, tensor.dtype, i))) ++i;
    const std::int64_t columns = tensor.shape[static_cast<std::size_t>(tensor.rank - 1)];
    const std::string place = tensor.rank == 1 ? concat(i) : concat(i / columns, ", ", i % columns);
    refuse_argument(concat(tensor_name(name), ": element [", place, "] is ",
                           read_float(tensor.data, tensor.dtype, i), ", expected a finite number"));
  }

  void read_groups(ValidatedModule& checked, std::int64_t k, std::int64_t group_size,
                   std::int64_t groups) const {
    if (module_.g_idx.present()) expect_shape(module_.g_idx, "g_idx", "[k]", {k});
    checked.group_of_row.resize(static_cast<std::size_t>(k));
    const auto count = static_cast<std::int32_t>(groups);
    std::int32_t moved = 0;
    std::int32_t wrong = 0;
    for (std::int32_t plain = 0; plain < count; ++plain) {
      const std::int64_t first = plain * group_size;
      const std::int64_t end = std::min(k, first + group_size);
      std::int32_t* const target = checked.group_of_row.data();
      if (!module_.g_idx.present()) {
        std::fill(target + first, target + end, plain);
        continue;
      }
      for (std::int64_t row = first; row < end; ++row) {
        const std::int32_t stored = group_at(row);
        const std::int32_t group = stored < 0 ? stored + count : stored;
        target[row] = group;
        moved |= group ^ plain;
        wrong |= group | (count - 1 - group);  // negative if either is
      }
    }
    checked.act_order = moved != 0;
    if (wrong >= 0) return;
    std::int64_t row = 0;
    while (group_at(row) >= -groups && group_at(row) < groups) ++row;
    refuse_argument(concat(tensor_name("g_idx"), ": element [", row, "] is ", group_at(row),
                           ", expected ", -groups, " to ", groups - 1, " for ", groups, " groups"));
  }

  std::int32_t group_at(std::int64_t row) const {
    return static_cast<std::int32_t>(read_integer(module_.g_idx.data, DType::kInt32, row));
  }

  // True when every stored field equals `code`. Fields repeat after as many words as they have
  // bits.
  bool all_fields_are(const ValidatedModule& checked, std::int64_t groups,
                      std::uint32_t code) const {
    const int bits = spec_.bits;
    std::uint32_t repeated[8] = {};
    for (int bit = 0; bit < 32 * bits; ++bit) {
      repeated[bit / 32] |= (code >> (bit % bits) & 1U) << (bit % 32);
    }
    const int period = bits == 3 ? 3 : 1;  // of words; other fields repeat inside a word
    const std::int64_t words = packed_words(checked.n, bits);
    const auto rest = static_cast<int>(checked.n * bits % 32);
    const std::int64_t whole = rest == 0 ? words : words - 1;
    for (std::int64_t group = 0; group < groups; ++group) {
      const std::uint8_t* row = checked.qzeros + group * words * 4;
      std::uint32_t difference = 0;
      for (int first = 0; first < period; ++first) {
        for (std::int64_t i = first; i < whole; i += period) {
          difference |= load_word(row, i) ^ repeated[first];
        }
      }
      if (rest != 0) {
        difference |= (load_word(row, whole) ^ repeated[whole % period]) & ((1U << rest) - 1U);
      }
      if (difference != 0) return false;
    }
    return true;
  }

  void decide_zero_points(ValidatedModule& checked, std::int64_t groups) const {
    const std::uint32_t middle = 1U << (spec_.bits - 1);
    checked.zero_points = spec_.zero_points != ZeroPoints::kAuto ? spec_.zero_points
                          : spec_.labelled != ZeroPoints::kAuto  ? spec_.labelled
                                                                 : ZeroPoints::kV1;
    if (checked.qzeros == nullptr) {
      checked.symmetric = true;
      return;
    }
    const bool all_below_middle = all_fields_are(checked, groups, middle - 1);
    const bool all_middle = !all_below_middle && all_fields_are(checked, groups, middle);
    if (spec_.zero_points == ZeroPoints::kAuto && spec_.symmetry != Symmetry::kAsymmetric) {
      if (all_below_middle) checked.zero_points = ZeroPoints::kV1;
      if (all_middle) checked.zero_points = ZeroPoints::kV2;
    }
    checked.symmetric = checked.zero_points == ZeroPoints::kV1 ? all_below_middle : all_middle;
  }

  // An old writer of v1 files stored a zero point of 0 as all-ones from its field to the top of the
  // word, so that the fields above it are lost. Today's writers borrow instead, which leaves lower
  // fields above.
  std::optional<std::string> lost_zero_points(const ValidatedModule& checked,
                                              std::int64_t groups) const {
    if (checked.qzeros == nullptr || checked.zero_points != ZeroPoints::kV1 || spec_.bits == 3 ||
        checked.symmetric) {
      return std::nullopt;
    }
    const int fields = 32 / spec_.bits;
    const std::uint32_t low_bits = 0xFFFFFFFFU / ((1U << spec_.bits) - 1U);  // of every field
    const std::uint32_t below_top = (1U << (32 - spec_.bits)) - 1U;
    // The fields of a word that are all-ones, at their low bit; not the top one.
    const auto all_ones_in = [=, two = spec_.bits >= 4 ? 2 : 0,
                              four = spec_.bits == 8 ? 4 : 0](std::uint32_t word) {
      word &= word >> 1;
      word &= word >> two;
      word &= word >> four;
      return word & low_bits & below_top;
    };
    const std::int64_t words = packed_words(checked.n, spec_.bits);
    const std::int64_t whole = checked.n / fields;  // padding above the last column tells nothing
    std::int64_t lost = 0;
    for (std::int64_t group = 0; group < groups; ++group) {
      const std::uint8_t* row = checked.qzeros + group * words * 4;
      std::uint32_t any = 0;
      for (std::int64_t i = 0; i < whole; ++i) any |= all_ones_in(load_word(row, i));
      if (any == 0) continue;
      for (std::int64_t i = 0; i < whole; ++i) {
        const std::uint32_t word = load_word(row, i);
        const std::uint32_t all_ones = all_ones_in(word);
        if (all_ones == 0) continue;
        const std::uint32_t to_the_top = ~0U << std::countr_zero(all_ones);
        if ((word & to_the_top) != to_the_top)
          return std::nullopt;  // a borrow: the file is complete
        ++lost;
      }
    }
    if (lost == 0) return std::nullopt;
    return concat(tensor_name("qzeros"), ": ", lost, " of ", groups * words,
                  " words are all-ones from some field to the top, as an old writer left them "
                  "where a zero point "
                  "was 0; the zero points above it are lost in the file and read as 0 and 1");
  }

  const GptqModule& module_;
  const GptqSpec& spec_;
};

}  // namespace

GptqWeights check_structure(const GptqTensors& tensors, const GptqSpec& spec) {
  if (spec.bits != 2 && spec.bits != 3 && spec.bits != 4 && spec.bits != 8) {
    refuse_argument(concat("bits: ", spec.bits, ", expected 2, 3, 4 or 8"));
  }
  if (spec.group_size != -1 && (spec.group_size < 1 || spec.group_size > kMaxExtent)) {
    refuse_argument(concat("group_size: ", spec.group_size, ", expected -1 or at least 1"));
  }
  if (spec.k < 0 || spec.k > kMaxExtent)
    refuse_argument(concat("k: ", spec.k, ", expected 1 to ", kMaxExtent));
  if (spec.n < 0 || spec.n > kMaxExtent)
    refuse_argument(concat("n: ", spec.n, ", expected 1 to ", kMaxExtent));
  if (tensors.modules.empty()) refuse_argument("modules: none, expected at least one");

  GptqWeights layer;
  layer.bits = spec.bits;
  GptqSpec shared = spec;
  for (const GptqModule& module : tensors.modules) {
    layer.modules.push_back(ModuleChecker(module, shared).check_structure(layer));
    layer.n += layer.modules.back().n;
    shared.k = layer.k;  // fused modules share the input
  }
  if (layer.n > kMaxExtent)
    refuse_argument(concat("n: ", layer.n, " in all, expected at most ", kMaxExtent));
  if (spec.n != 0 && layer.n != spec.n) {
    refuse_argument(concat(tensors.modules.front().name,
                           tensors.modules.front().name.empty() ? "" : ".",
                           "qweight: n = ", layer.n, " output features, expected ", spec.n));
  }
  return layer;
}

void decide_zero_points(const GptqTensors& tensors, const GptqSpec& spec, GptqWeights& layer) {
  for (std::size_t i = 0; i < layer.modules.size(); ++i) {
    ModuleChecker(tensors.modules[i], spec).check_zero_points(layer, layer.modules[i]);
  }
}

void NumberCheck::look(std::int64_t scales) {
  while (scales > 0 && !ended()) {
    ValidatedModule& checked = layer_->modules[module_];
    const ModuleChecker checker(tensors_->modules[module_], *spec_);
    const std::int64_t all = layer_->groups * checked.n;
    const std::int64_t count = std::min(scales, all - seen_);
    checker.check_scales(checked, seen_, count);
    seen_ += count;
    scales -= count;
    if (seen_ < all) return;
    checker.check_bias();
    ++module_;
    seen_ = 0;
  }
}

void check_values(const GptqTensors& tensors, const GptqSpec& spec, GptqWeights& layer) {
  NumberCheck(tensors, spec, layer).look(layer.groups * layer.n);
  decide_zero_points(tensors, spec, layer);
}

GptqWeights validate(const GptqTensors& tensors, const GptqSpec& spec) {
  GptqWeights layer = check_structure(tensors, spec);
  check_values(tensors, spec, layer);
  return layer;
}

}  // namespace marlinq
