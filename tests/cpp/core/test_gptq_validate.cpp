// validate(): every refusal with its message, and what it decides about groups and zero points.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <limits>
#include <string>
#include <vector>

#include "marlinq/gptq.hpp"
#include "support/compare.hpp"

namespace marlinq {
namespace {

using test::expect_refused;
using test::Layer;
using test::LayerOptions;
using test::make_layer;
using test::Order;
using test::Zeros;

// k 96, n 24, groups of 32: qweight [12, 24], scales [3, 24], qzeros [3, 3], g_idx [96], bias [24].
Layer small_layer() {
  return make_layer({.bits = 4,
                     .k = 96,
                     .n = 24,
                     .group_size = 32,
                     .zeros = Zeros::kAsymmetricV1,
                     .order = Order::kActOrder,
                     .bias = DType::kFloat32,
                     .name = "model.q_proj"});
}

class ValidateTest : public ::testing::Test {
 protected:
  void refused(std::initializer_list<std::string_view> parts) {
    expect_refused(parts, [&] { validate(GptqTensors(module), spec); });
  }

  Layer layer = small_layer();
  GptqModule module = layer.module();
  GptqSpec spec = layer.spec();
};

TEST_F(ValidateTest, AcceptsAndDescribes) {
  const GptqWeights weights = validate(GptqTensors(module), spec);
  EXPECT_EQ(weights.bits, 4);
  EXPECT_EQ(weights.k, 96);
  EXPECT_EQ(weights.n, 24);
  EXPECT_EQ(weights.group_size, 32);
  EXPECT_EQ(weights.groups, 3);
  EXPECT_TRUE(weights.warnings.empty());
  ASSERT_EQ(weights.modules.size(), 1U);
  const ValidatedModule& checked = weights.modules[0];
  EXPECT_EQ(checked.name, "model.q_proj");
  EXPECT_EQ(checked.n, 24);
  EXPECT_EQ(checked.qweight, module.qweight.data);
  EXPECT_EQ(checked.qzeros, module.qzeros.data);
  EXPECT_EQ(checked.scales, module.scales.data);
  EXPECT_EQ(checked.bias, module.bias.data);
  EXPECT_EQ(checked.scale_dtype, DType::kFloat16);
  EXPECT_EQ(checked.bias_dtype, DType::kFloat32);
  EXPECT_EQ(checked.zero_points, ZeroPoints::kV1);
  EXPECT_FALSE(checked.symmetric);
  EXPECT_TRUE(checked.act_order);
  EXPECT_EQ(checked.bytes, 12U * 24 * 4 + 3 * 24 * 2 + 3 * 3 * 4 + 96 * 4 + 24 * 4);
}

// --- the spec ---

TEST_F(ValidateTest, RefusesBits) {
  for (const int bits : {-4, 0, 1, 5, 6, 7, 9, 16, 32}) {
    spec.bits = bits;
    refused({"bits: " + std::to_string(bits), "expected 2, 3, 4 or 8"});
  }
}

TEST_F(ValidateTest, RefusesGroupSizes) {
  for (const std::int64_t size :
       {std::int64_t{0}, std::int64_t{-2}, std::int64_t{-128},
        std::numeric_limits<std::int64_t>::max(), std::numeric_limits<std::int64_t>::min()}) {
    spec.group_size = size;
    refused({"group_size: " + std::to_string(size), "expected -1 or at least 1"});
  }
}

TEST_F(ValidateTest, RefusesExtents) {
  for (const std::int64_t extent : {std::int64_t{-1}, std::numeric_limits<std::int64_t>::max()}) {
    spec = layer.spec();
    spec.k = extent;
    refused({"k: " + std::to_string(extent), "expected 1 to"});
    spec = layer.spec();
    spec.n = extent;
    refused({"n: " + std::to_string(extent), "expected 1 to"});
  }
}

TEST_F(ValidateTest, RefusesNoModules) {
  expect_refused({"modules: none", "expected at least one"},
                 [&] { validate(GptqTensors(), spec); });
}

TEST_F(ValidateTest, RefusesAnotherK) {
  spec.k = 104;
  refused({"model.q_proj.qweight", "shape [12, 24]", "[ceil(k * bits / 32), n] = [13, 24]"});
  spec.k = 95;  // the words would do, g_idx does not
  refused({"model.q_proj.g_idx", "shape [96]", "[k] = [95]"});
}

TEST_F(ValidateTest, RefusesAnotherN) {
  spec.n = 25;
  refused({"model.q_proj.qweight", "n = 24 output features", "expected 25"});
}

TEST_F(ValidateTest, RefusesAnotherGroupSize) {
  spec.group_size = 48;
  refused({"model.q_proj.scales", "shape [3, 24]", "[ceil(k / group_size), n] = [2, 24]",
           "group_size = 48"});
  spec.group_size = -1;
  refused({"model.q_proj.scales", "shape [3, 24]", "= [1, 24]"});
}

TEST_F(ValidateTest, RefusesOtherBits) {
  spec.bits = 8;
  refused({"model.q_proj.qweight", "shape [12, 24]", "= [24, 24]", "bits = 8"});
}

// --- the tensors ---

TEST_F(ValidateTest, RefusesMissingTensors) {
  module.qweight = {};
  refused({"model.q_proj.qweight", "missing"});
  module = layer.module();
  module.scales = {};
  refused({"model.q_proj.scales", "missing"});
}

TEST_F(ValidateTest, MessagesOfANamelessModuleNameTheTensorAlone) {
  module.name.clear();
  module.scales = {};
  try {
    validate(GptqTensors(module), spec);
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "scales: missing");
  }
}

struct TensorCase {
  const char* name;
  HostTensor GptqModule::* tensor;
  int rank;
  bool floating;
};

class ValidateTensorTest : public ValidateTest, public ::testing::WithParamInterface<TensorCase> {
 protected:
  HostTensor& tensor() { return module.*GetParam().tensor; }
  std::string name() const { return std::string("model.q_proj.") + GetParam().name + ":"; }
};

TEST_P(ValidateTensorTest, RefusesOtherDTypes) {
  for (const DType dtype :
       {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt32, DType::kInt64}) {
    const bool floating =
        dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
    if (GetParam().floating ? floating : dtype == DType::kInt32) continue;
    tensor().dtype = dtype;
    refused({name(), "dtype " + std::string(to_string(dtype)),
             GetParam().floating ? "expected float32, float16 or bfloat16" : "expected int32"});
  }
}

TEST_P(ValidateTensorTest, RefusesOtherRanks) {
  for (const int rank : {1, 2, 3, 7, -1}) {
    if (rank == GetParam().rank) continue;
    tensor().rank = rank;
    refused({name(), std::to_string(rank) + " dimensions",
             "expected " + std::to_string(GetParam().rank)});
  }
}

TEST_P(ValidateTensorTest, RefusesOtherLengths) {
  const std::size_t right = tensor().bytes;
  for (const std::size_t bytes :
       {right - 1, right + 1, right / 2, std::size_t{0}, std::numeric_limits<std::size_t>::max()}) {
    tensor().bytes = bytes;
    refused({name(), std::to_string(bytes) + " bytes", "expected " + std::to_string(right)});
  }
}

TEST_P(ValidateTensorTest, RefusesNullData) {
  const std::size_t right = tensor().bytes;
  tensor().data = nullptr;
  refused({name(), "0 bytes", "expected " + std::to_string(right)});
}

TEST_P(ValidateTensorTest, RefusesOtherShapes) {
  const std::array<std::int64_t, 2> right = tensor().shape;
  for (int axis = 0; axis < GetParam().rank; ++axis) {
    for (const std::int64_t extent :
         {right[static_cast<std::size_t>(axis)] + 1, right[static_cast<std::size_t>(axis)] - 1,
          std::int64_t{0}, std::int64_t{-1}, std::numeric_limits<std::int64_t>::max(),
          std::numeric_limits<std::int64_t>::min()}) {
      tensor().shape = right;
      tensor().shape[static_cast<std::size_t>(axis)] = extent;
      SCOPED_TRACE(::testing::Message() << "axis " << axis << " = " << extent);
      // A wrong n of qweight may come to light in the tensor that does not fit it.
      refused({"model.q_proj.", "expected"});
      spec.k = 0;  // and the same when k is to come from the tensors
      refused({"model.q_proj.", "expected"});
      spec = layer.spec();
    }
  }
}

TEST_P(ValidateTensorTest, NamesTheTensorWhoseShapeIsWrong) {
  const bool is_qweight = GetParam().tensor == &GptqModule::qweight;
  tensor().shape[0] += 1;
  refused({name(), "shape [" + std::to_string(tensor().shape[0]), "expected ["});
  if (GetParam().rank == 2 && !is_qweight) {
    module = layer.module();
    tensor().shape[1] += 1;
    refused({name(), "shape [", "expected ["});
  }
}

INSTANTIATE_TEST_SUITE_P(Tensors, ValidateTensorTest,
                         ::testing::Values(TensorCase{"qweight", &GptqModule::qweight, 2, false},
                                           TensorCase{"scales", &GptqModule::scales, 2, true},
                                           TensorCase{"qzeros", &GptqModule::qzeros, 2, false},
                                           TensorCase{"g_idx", &GptqModule::g_idx, 1, false},
                                           TensorCase{"bias", &GptqModule::bias, 1, true}),
                         [](const auto& test) { return std::string(test.param.name); });

TEST_F(ValidateTest, RefusesScalesAndBiasThatAreNotFinite) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const double value :
         {std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity(),
          std::numeric_limits<double>::quiet_NaN()}) {
      LayerOptions options = layer.options;
      options.scales = dtype;
      options.bias = dtype;
      Layer bad = make_layer(options);
      test::write_element(bad.scales.data(), dtype, 24 + 5, value);
      module = bad.module();
      refused({"model.q_proj.scales", "element [1, 5]", "expected a finite number"});
      bad = make_layer(options);
      test::write_element(bad.bias.data(), dtype, 23, value);
      module = bad.module();
      refused({"model.q_proj.bias", "element [23]", "expected a finite number"});
    }
  }
}

TEST_F(ValidateTest, KnowsTheRangeOfScales) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const std::size_t shift : {0U, 1U}) {  // of the address
      LayerOptions options = layer.options;
      options.scales = dtype;
      Layer other = make_layer(options);
      const auto elements = static_cast<std::int64_t>(other.scales.size() / size_of(dtype));
      const auto checked = [&] {
        std::vector<unsigned char> bytes(shift);
        bytes.insert(bytes.end(), other.scales.begin(), other.scales.end());
        module = other.module();
        module.scales.data = bytes.data() + shift;
        return validate(GptqTensors(module), spec).modules[0];
      };
      for (std::int64_t i = 0; i < elements; ++i) {
        test::write_element(other.scales.data(), dtype, i, i % 2 == 0 ? 0.5 : -0.25);
      }
      test::write_element(other.scales.data(), dtype, elements - 1, -3.0);
      test::write_element(other.scales.data(), dtype, 1, 0x1p-20);
      test::write_element(other.scales.data(), dtype, 2, 0.0);
      test::write_element(other.scales.data(), dtype, 3, -0.0);
      EXPECT_EQ(checked().least_scale, 0x1p-20F);
      EXPECT_EQ(checked().most_scale, 3.0F);
      std::fill(other.scales.begin(), other.scales.end(), static_cast<unsigned char>(0));
      EXPECT_EQ(checked().least_scale, 0.0F);
      EXPECT_EQ(checked().most_scale, 0.0F);
    }
  }
}

TEST_F(ValidateTest, KnowsTheRangeOfScalesWhereverItsEndsStand) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    LayerOptions options = layer.options;
    options.scales = dtype;
    for (std::int64_t i = 0; i < 72; ++i) {
      Layer other = make_layer(options);
      for (std::int64_t j = 0; j < 72; ++j) {
        test::write_element(other.scales.data(), dtype, j, j == i ? -0x1p-20 : 0.5);
      }
      test::write_element(other.scales.data(), dtype, (i + 7) % 72, 3.0);
      module = other.module();
      const ValidatedModule checked = validate(GptqTensors(module), spec).modules[0];
      EXPECT_EQ(checked.least_scale, 0x1p-20F) << i;
      EXPECT_EQ(checked.most_scale, 3.0F) << i;
    }
  }
}

TEST_F(ValidateTest, RefusesGroupsOutOfRange) {
  for (const std::int32_t group : {3, -4, 1000000, std::numeric_limits<std::int32_t>::max(),
                                   std::numeric_limits<std::int32_t>::min()}) {
    layer.g_idx[95] = group;
    refused({"model.q_proj.g_idx", "element [95] is " + std::to_string(group), "expected -3 to 2",
             "3 groups"});
  }
}

// --- k, groups and act-order ---

TEST(ValidateKTest, ComesFromGIdxElseFromQweight) {
  const Layer with = make_layer({.k = 60, .n = 8, .group_size = 32, .order = Order::kTrivial});
  GptqSpec spec = with.spec();
  spec.k = 0;
  EXPECT_EQ(validate(with.tensors(), spec).k, 60);
  const Layer without = make_layer({.k = 64, .n = 8, .group_size = 32});
  EXPECT_EQ(validate(without.tensors(), spec).k, 64);
}

TEST(ValidateGroupsTest, ActOrderIsDecidedFromTheTensor) {
  struct Case {
    Order order;
    bool act_order;
  };
  for (const Case& c :
       {Case{Order::kNone, false}, Case{Order::kTrivial, false}, Case{Order::kActOrder, true},
        Case{Order::kUnbalanced, true}, Case{Order::kNegative, true}}) {
    const Layer layer = make_layer({.k = 100, .n = 8, .group_size = 32, .order = c.order});
    const GptqWeights weights = validate(layer.tensors(), layer.spec());
    EXPECT_EQ(weights.modules[0].act_order, c.act_order) << static_cast<int>(c.order);
    ASSERT_EQ(weights.groups, 4);
    for (std::size_t k = 0; k < 100; ++k) {
      ASSERT_EQ(weights.modules[0].group_of_row[k], layer.group_of_row[k]) << "row " << k;
    }
  }
}

TEST(ValidateGroupsTest, NegativeButTrivialIsPlain) {
  Layer layer = make_layer({.k = 64, .n = 8, .group_size = 32, .order = Order::kTrivial});
  for (std::int32_t& group : layer.g_idx) group -= 2;
  EXPECT_FALSE(validate(layer.tensors(), layer.spec()).modules[0].act_order);
}

TEST(ValidateGroupsTest, MinusOneIsOneGroup) {
  const Layer layer = make_layer({.k = 100, .n = 8, .group_size = -1, .order = Order::kTrivial});
  const GptqWeights weights = validate(layer.tensors(), layer.spec());
  EXPECT_EQ(weights.groups, 1);
  EXPECT_EQ(weights.group_size, 100);
}

TEST(ValidateGroupsTest, GroupsLargerThanK) {
  const Layer layer = make_layer({.k = 7, .n = 8, .group_size = 1024});
  EXPECT_EQ(validate(layer.tensors(), layer.spec()).groups, 1);
}

// --- fused modules ---

TEST(ValidateFusedTest, AddsUpAndKeepsEachPart) {
  const std::vector<Layer> parts = {
      make_layer({.k = 64, .n = 8, .group_size = 32, .seed = 1, .name = "q"}),
      make_layer(
          {.k = 64, .n = 24, .group_size = 32, .order = Order::kActOrder, .seed = 2, .name = "k"})};
  GptqSpec spec = parts[0].spec();
  spec.n = 32;
  const GptqWeights weights = validate(test::fused(parts), spec);
  EXPECT_EQ(weights.n, 32);
  ASSERT_EQ(weights.modules.size(), 2U);
  EXPECT_FALSE(weights.modules[0].act_order);
  EXPECT_TRUE(weights.modules[1].act_order);
  spec.n = 33;
  expect_refused({"q.qweight", "n = 32 output features", "expected 33"},
                 [&] { validate(test::fused(parts), spec); });
}

TEST(ValidateFusedTest, NamesThePartThatDoesNotFit) {
  const std::vector<Layer> parts = {make_layer({.k = 64, .n = 8, .group_size = 32, .name = "gate"}),
                                    make_layer({.k = 72, .n = 8, .group_size = 32, .name = "up"})};
  GptqSpec spec = parts[0].spec();
  spec.k = 0;
  expect_refused({"up.qweight", "shape [9, 8]", "= [8, 8]"},
                 [&] { validate(test::fused(parts), spec); });
}

// --- zero points ---

struct Rule {
  Zeros stored;
  ZeroPoints asked;
  ZeroPoints labelled;
  Symmetry symmetry;
  ZeroPoints decided;
  bool symmetric;
};

class ZeroPointRuleTest : public ::testing::TestWithParam<int> {};

TEST_P(ZeroPointRuleTest, Decides) {
  constexpr auto kAuto = ZeroPoints::kAuto;
  constexpr auto kV1 = ZeroPoints::kV1;
  constexpr auto kV2 = ZeroPoints::kV2;
  constexpr auto kUnknown = Symmetry::kUnknown;
  constexpr auto kSym = Symmetry::kSymmetric;
  constexpr auto kAsym = Symmetry::kAsymmetric;
  const std::vector<Rule> rules = {
      // The codes decide, whatever the label says.
      {Zeros::kSymmetricV1, kAuto, kAuto, kUnknown, kV1, true},
      {Zeros::kSymmetricV1, kAuto, kV1, kSym, kV1, true},
      {Zeros::kSymmetricV1, kAuto, kV2, kSym, kV1, true},
      {Zeros::kSymmetricV2, kAuto, kAuto, kUnknown, kV2, true},
      {Zeros::kSymmetricV2, kAuto, kV1, kSym, kV2, true},
      {Zeros::kSymmetricV2, kAuto, kV2, kSym, kV2, true},
      {Zeros::kSymmetricV2, kAuto, kV1, kUnknown, kV2, true},
      // An asymmetric configuration is believed: equal zero points are a coincidence then.
      {Zeros::kSymmetricV1, kAuto, kV2, kAsym, kV2, false},
      {Zeros::kSymmetricV2, kAuto, kV1, kAsym, kV1, false},
      {Zeros::kSymmetricV2, kAuto, kAuto, kAsym, kV1, false},
      {Zeros::kSymmetricV1, kAuto, kAuto, kAsym, kV1, true},
      // Mixed codes follow the label; a flag that says symmetric lies.
      {Zeros::kAsymmetricV1, kAuto, kAuto, kUnknown, kV1, false},
      {Zeros::kAsymmetricV1, kAuto, kV1, kSym, kV1, false},
      {Zeros::kAsymmetricV2, kAuto, kV2, kSym, kV2, false},
      {Zeros::kAsymmetricV2, kAuto, kV2, kAsym, kV2, false},
      {Zeros::kAsymmetricV2, kAuto, kV1, kSym, kV1, false},
      // No zero points.
      {Zeros::kAbsent, kAuto, kAuto, kUnknown, kV1, true},
      {Zeros::kAbsent, kAuto, kV2, kAsym, kV2, true},
      // What the caller asks for wins over everything.
      {Zeros::kSymmetricV1, kV2, kV1, kSym, kV2, false},
      {Zeros::kSymmetricV2, kV1, kV2, kSym, kV1, false},
      {Zeros::kSymmetricV1, kV1, kV2, kAsym, kV1, true},
      {Zeros::kSymmetricV2, kV2, kV1, kSym, kV2, true},
      {Zeros::kAsymmetricV1, kV2, kV1, kUnknown, kV2, false},
  };
  const int bits = GetParam();
  for (std::size_t i = 0; i < rules.size(); ++i) {
    const Rule& rule = rules[i];
    const Layer layer = make_layer(
        {.bits = bits, .k = 64, .n = 30, .group_size = 32, .zeros = rule.stored, .seed = 4});
    GptqSpec spec = layer.spec();
    spec.zero_points = rule.asked;
    spec.labelled = rule.labelled;
    spec.symmetry = rule.symmetry;
    const ValidatedModule checked = validate(layer.tensors(), spec).modules[0];
    EXPECT_EQ(checked.zero_points, rule.decided) << "rule " << i;
    EXPECT_EQ(checked.symmetric, rule.symmetric) << "rule " << i;
    // The reference, which decides for the other tests, knows the same rule.
    EXPECT_EQ(test::expected_convention(layer.module(), spec), rule.decided) << "rule " << i;
  }
}

// One field that is off makes a module asymmetric, wherever it stands; padding fields do not count.
TEST_P(ZeroPointRuleTest, EveryFieldIsLookedAt) {
  const int bits = GetParam();
  const std::uint32_t middle = 1U << (bits - 1);
  for (const Zeros zeros : {Zeros::kSymmetricV1, Zeros::kSymmetricV2}) {
    Layer layer =
        make_layer({.bits = bits, .k = 64, .n = 13, .group_size = 32, .zeros = zeros, .seed = 4});
    for (std::size_t i = 0; i < layer.zeros.size(); ++i) {
      layer.zeros[i] = middle + 1;
      test::pack_zeros(layer);
      GptqSpec spec = layer.spec();
      spec.labelled = ZeroPoints::kV2;
      const ValidatedModule checked = validate(layer.tensors(), spec).modules[0];
      EXPECT_FALSE(checked.symmetric) << i;
      EXPECT_EQ(checked.zero_points, ZeroPoints::kV2) << i;
      layer.zeros[i] = middle;
    }
    test::pack_zeros(layer);
    EXPECT_TRUE(validate(layer.tensors(), layer.spec()).modules[0].symmetric);
  }
}

TEST_P(ZeroPointRuleTest, EachFusedPartDecidesForItself) {
  const int bits = GetParam();
  const std::vector<Layer> parts = {
      make_layer({.bits = bits, .k = 64, .n = 16, .zeros = Zeros::kSymmetricV1, .name = "a"}),
      make_layer({.bits = bits, .k = 64, .n = 16, .zeros = Zeros::kSymmetricV2, .name = "b"})};
  const GptqWeights weights = validate(test::fused(parts), parts[0].spec());
  EXPECT_EQ(weights.modules[0].zero_points, ZeroPoints::kV1);
  EXPECT_EQ(weights.modules[1].zero_points, ZeroPoints::kV2);
}

INSTANTIATE_TEST_SUITE_P(Bits, ZeroPointRuleTest, ::testing::Values(2, 3, 4, 8));

// --- zero points that an old writer lost ---

class LostZerosTest : public ::testing::TestWithParam<int> {
 protected:
  // One full word of fields a group; zero points 3, 3, ... unless a test says otherwise.
  Layer full_words() {
    const int bits = GetParam();
    const std::int64_t n = bits == 3 ? 32 : 32 / bits;
    Layer layer = make_layer({.bits = bits,
                              .k = 64,
                              .n = n,
                              .group_size = 32,
                              .zeros = Zeros::kAsymmetricV1,
                              .name = "m"});
    std::fill(layer.zeros.begin(), layer.zeros.end(), 3U);
    layer.zeros.front() = 2;
    test::pack_zeros(layer);
    return layer;
  }
  static std::vector<std::string> warnings(const Layer& layer) {
    return validate(layer.tensors(), layer.spec()).warnings;
  }
};

TEST_P(LostZerosTest, WarnsOfTheOldWriter) {
  Layer layer = full_words();
  layer.qzeros[1] |= ~0U << GetParam();  // zero point 0 in field 1: all-ones from there to the top
  const std::vector<std::string> found = warnings(layer);
  if (GetParam() == 3) {  // 3 bits are written field by field: nothing is ever lost
    EXPECT_TRUE(found.empty());
    return;
  }
  ASSERT_EQ(found.size(), 1U);
  EXPECT_NE(found[0].find("m.qzeros"), std::string::npos) << found[0];
  EXPECT_NE(found[0].find("1 of 2 words"), std::string::npos) << found[0];
}

TEST_P(LostZerosTest, QuietWithoutZeroPointsOfZero) { EXPECT_TRUE(warnings(full_words()).empty()); }

TEST_P(LostZerosTest, QuietForAWriterThatBorrows) {
  Layer layer = full_words();
  layer.zeros[1] = 0;
  test::pack_zeros(layer);
  EXPECT_TRUE(warnings(layer).empty());
  // Also where one word happens to borrow to its top, as long as another shows the borrow.
  const std::int64_t n = layer.options.n;
  for (std::int64_t i = 1; i < n; ++i)
    layer.zeros[static_cast<std::size_t>(n + i)] = i == 1 ? 0 : 1;
  test::pack_zeros(layer);
  EXPECT_TRUE(warnings(layer).empty());
}

TEST_P(LostZerosTest, QuietForTheTopField) {  // nothing stands above it
  Layer layer = full_words();
  layer.zeros[static_cast<std::size_t>(layer.options.n - 1)] = 0;
  test::pack_zeros(layer);
  EXPECT_TRUE(warnings(layer).empty());
}

TEST_P(LostZerosTest, QuietForV2) {
  LayerOptions options = full_words().options;
  options.zeros = Zeros::kAsymmetricV2;
  Layer layer = make_layer(options);
  std::fill(layer.qzeros.begin(), layer.qzeros.end(), 0xFFFFFFFFU);
  EXPECT_TRUE(warnings(layer).empty());
}

INSTANTIATE_TEST_SUITE_P(Bits, LostZerosTest, ::testing::Values(2, 3, 4, 8));

}  // namespace
}  // namespace marlinq
