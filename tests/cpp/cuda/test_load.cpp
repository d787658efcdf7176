// Loading onto a device, against the bytes that layout.hpp describes. Built twice: for a real device,
// and for the fake one, on which it runs everywhere.
#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "core/gptq_checks.hpp"
#include "cuda/arch/sm80/load.hpp"
#include "cuda/arch/sm80/pack_plan.hpp"
#include "cuda/device_memory.hpp"
#include "cuda/packed_layer.hpp"
#include "cuda/upload.hpp"
#include "support/compare.hpp"
#include "support/numbers.hpp"

namespace marlinq {
namespace {

using cuda::DeviceWeight;
using cuda::LayersToLoad;
using cuda::LayerUpload;
using cuda::Uploader;
using cuda::UploadSizes;
using cuda::WeightView;
using test::DeviceMemory;
using test::Layer;
using test::make_layer;
using test::Order;
using test::PackCase;
using test::same;
using test::Zeros;
using Bytes = std::vector<unsigned char>;

enum class Source { kPageable, kPinned, kMisaligned, kMisalignedPinned, kMapped, kSomePinned };

constexpr Source kSources[] = {Source::kPageable,         Source::kPinned, Source::kMisaligned,
                               Source::kMisalignedPinned, Source::kMapped, Source::kSomePinned};

void check(cudaError_t status) { ASSERT_EQ(status, cudaSuccess) << cudaGetErrorString(status); }

// A layer's tensors in host memory of some kind, until they are taken away.
class Tensors {
 public:
  Tensors(const PackCase& one, Source source) : layer_(one.tensors()), source_(source) {
    std::size_t bytes = 0;
    for_each([&bytes](const HostTensor& tensor) { bytes += tensor.bytes + kGap; });
    size_ = bytes + kGap;
    pinned_ = source == Source::kPinned || source == Source::kMisalignedPinned;
    if (pinned_) {
      void* memory = nullptr;
      check(cudaHostAlloc(&memory, size_, cudaHostAllocDefault));
      memory_ = static_cast<unsigned char*>(memory);
    } else if (source == Source::kSomePinned) {
      void* memory = nullptr;
      check(cudaHostAlloc(&memory, size_, cudaHostAllocDefault));
      some_pinned_ = static_cast<unsigned char*>(memory);
      memory_ = new unsigned char[size_];
    } else {
      memory_ = new unsigned char[size_];
    }
    const bool odd = source == Source::kMisaligned || source == Source::kMisalignedPinned;
    std::size_t at = odd ? 1 : 0;
    int number = 0;
    for_each([&](HostTensor& tensor) {
      unsigned char* base = some_pinned_ != nullptr && number++ % 2 == 0 ? some_pinned_ : memory_;
      std::memcpy(base + at, tensor.data, tensor.bytes);
      tensor.data = base + at;
      at += odd ? (tensor.bytes + 1) | 1 : (tensor.bytes + kGap - 1) / kGap * kGap;
    });
    if (source == Source::kMapped) map();
  }
  Tensors(const Tensors&) = delete;
  Tensors& operator=(const Tensors&) = delete;
  ~Tensors() { take_away(); }

  const GptqTensors& layer() const { return layer_; }

  // As a caller may once load_gptq() has returned: others' bytes, and then nothing.
  void take_away() {
    if (memory_ == nullptr) return;
    if (source_ == Source::kMapped) {
      munmap(memory_, size_);
    } else {
      std::memset(memory_, 0xEE, size_);
      if (pinned_) {
        check(cudaFreeHost(memory_));
      } else {
        delete[] memory_;
      }
    }
    if (some_pinned_ != nullptr) {
      std::memset(some_pinned_, 0xEE, size_);
      check(cudaFreeHost(some_pinned_));
    }
    memory_ = nullptr;
  }

 private:
  static constexpr std::size_t kGap = 64;

  template <class F>
  void for_each(const F& f) {
    for (GptqModule& module : layer_.modules) {
      for (HostTensor* tensor :
           {&module.qweight, &module.scales, &module.qzeros, &module.g_idx, &module.bias}) {
        if (tensor->present()) f(*tensor);
      }
    }
  }

  // The same bytes in a file that is mapped for reading only.
  void map() {
    std::string name = ::testing::TempDir() + "marlinq_tensors_XXXXXX";
    const int file = mkstemp(name.data());
    ASSERT_GE(file, 0);
    ASSERT_EQ(unlink(name.c_str()), 0);
    ASSERT_EQ(write(file, memory_, size_), static_cast<ssize_t>(size_));
    void* mapped = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    ASSERT_NE(mapped, MAP_FAILED);
    close(file);
    const unsigned char* before = memory_;
    for_each([&](HostTensor& tensor) {
      tensor.data = static_cast<const unsigned char*>(mapped) +
                    (static_cast<const unsigned char*>(tensor.data) - before);
    });
    delete[] memory_;
    memory_ = static_cast<unsigned char*>(mapped);
  }

  GptqTensors layer_;
  Source source_;
  bool pinned_ = false;
  unsigned char* memory_ = nullptr;
  unsigned char* some_pinned_ = nullptr;
  std::size_t size_ = 0;
};

DeviceWeight load(Uploader& uploader, std::span<const GptqTensors> experts, const GptqSpec& spec) {
  LayersToLoad layers(experts, spec);
  LayerUpload upload(uploader, layers);
  return cuda::sm80::load(layers, upload);
}

DeviceWeight load(Uploader& uploader, const PackCase& one, Source source = Source::kPageable) {
  Tensors tensors(one, source);
  DeviceWeight packed = load(uploader, {&tensors.layer(), 1}, one.spec());
  tensors.take_away();
  return packed;
}

Bytes bytes_of(const DeviceWeight& weight) {
  weight.ready.wait();
  Bytes bytes(static_cast<std::size_t>(weight.memory.size()) * 4);
  check(cudaMemcpy(bytes.data(), weight.memory.data(), bytes.size(), cudaMemcpyDeviceToHost));
  return bytes;
}

// Small layers in many pieces and jobs.
UploadSizes small_sizes() {
  return {.least_piece = 2048, .most_piece = 4096, .ring = {.slot_bytes = 512, .threads = 3}};
}

class LoadTest : public ::testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "no CUDA device";
    bytes_before_ = DeviceMemory::bytes();
    pinned_before_ = DeviceMemory::pinned_bytes();
  }
  void TearDown() override {
    EXPECT_EQ(DeviceMemory::bytes(), bytes_before_);
    EXPECT_EQ(DeviceMemory::pinned_bytes(), pinned_before_);
  }

  static const std::vector<PackCase>& cases() {
    static const std::vector<PackCase> all = test::pack_cases();
    return all;
  }
  static const Bytes& expected(std::size_t index) {
    static const std::vector<Bytes> all = [] {
      std::vector<Bytes> bytes;
      for (const PackCase& one : cases()) bytes.push_back(test::packed_by_definition(one.parts));
      return bytes;
    }();
    return all[index];
  }

  // Loads a stack from memory of every kind, and expects the bytes of each expert to be those that
  // `expected` has for it.
  static void check_stack(const std::vector<PackCase>& experts, const std::vector<Bytes>& expected,
                          std::optional<cuda::FloatType> scale_type = std::nullopt) {
    GptqSpec spec = experts.front().spec();
    spec.n = 0;
    for (const Source source : kSources) {
      std::vector<std::unique_ptr<Tensors>> tensors;
      std::vector<GptqTensors> layers;
      for (const PackCase& one : experts) {
        tensors.push_back(std::make_unique<Tensors>(one, source));
        layers.push_back(tensors.back()->layer());
      }
      for (const UploadSizes& sizes : {UploadSizes{}, small_sizes()}) {
        Uploader uploader(0, sizes);
        const DeviceWeight stack = load(uploader, layers, spec);
        ASSERT_EQ(stack.experts, static_cast<std::int64_t>(experts.size()));
        if (scale_type) {
          EXPECT_EQ(stack.segments[0].view.scale_type, *scale_type);
        }
        const Bytes all = bytes_of(stack);
        ASSERT_EQ(static_cast<std::int64_t>(all.size()), stack.experts * stack.expert_bytes);
        for (std::size_t e = 0; e < experts.size(); ++e) {
          const auto begin = all.begin() + static_cast<std::int64_t>(e) * stack.expert_bytes;
          ASSERT_TRUE(same(Bytes(begin, begin + stack.expert_bytes), expected[e]))
              << "expert " << e << ", source " << static_cast<int>(source);
        }
      }
    }
  }
  static void check_stack(const std::vector<PackCase>& experts) {
    std::vector<Bytes> expected;
    for (const PackCase& one : experts) expected.push_back(test::packed_by_definition(one.parts));
    check_stack(experts, expected);
  }

  std::int64_t bytes_before_ = 0;
  std::int64_t pinned_before_ = 0;
};

TEST_F(LoadTest, PacksWhatTheLayoutSays) {
  for (const UploadSizes& sizes : {UploadSizes{}, small_sizes()}) {
    Uploader uploader(0, sizes);
    for (std::size_t i = 0; i < cases().size(); ++i) {
      ASSERT_TRUE(same(bytes_of(load(uploader, cases()[i])), expected(i))) << cases()[i].what;
    }
  }
}

// One after another with no wait in between: staging and pinned slots are used again at once.
TEST_F(LoadTest, LoadsInARow) {
  for (const Source source : {Source::kPageable, Source::kPinned, Source::kSomePinned}) {
    Uploader uploader(0, small_sizes());
    std::vector<DeviceWeight> weights;
    for (const PackCase& one : cases()) weights.push_back(load(uploader, one, source));
    for (std::size_t i = 0; i < cases().size(); ++i) {
      ASSERT_TRUE(same(bytes_of(weights[i]), expected(i))) << cases()[i].what;
    }
  }
}

// An expert is a pointer offset: its bytes are contiguous, and those of the same weight loaded alone.
TEST_F(LoadTest, AnExpertHasTheBytesOfTheLayer) {
  constexpr std::int64_t kExperts = 5;
  for (const bool asymmetric : {false, true}) {
    for (const Order order : {Order::kNone, Order::kActOrder}) {
      std::vector<PackCase> cases;
      for (std::uint64_t e = 0; e < kExperts; ++e) {
        const Layer gate =
            make_layer({.bits = 4,
                        .k = 320,
                        .n = 96,
                        .group_size = 32,
                        .zeros = asymmetric ? Zeros::kAsymmetricV1 : Zeros::kSymmetricV1,
                        .order = order,
                        .bias = DType::kFloat16,
                        .seed = e + 1});
        cases.push_back({.what = "", .parts = {gate, gate}});
      }
      check_stack(cases);
    }
  }
}

// The tables of plain experts without bias are the same, and come at once.
TEST_F(LoadTest, PlainExperts) {
  std::vector<PackCase> cases;
  for (std::uint64_t e = 0; e < 40; ++e) {
    cases.push_back({.what = "",
                     .parts = {make_layer({.k = 256, .n = 90, .group_size = 32, .seed = e + 1}),
                               make_layer({.k = 256, .n = 70, .group_size = 32, .seed = e + 99})}});
  }
  check_stack(cases);
}

// What the first expert does not need is found out only when others have been packed.
TEST_F(LoadTest, ALaterExpertMayNeedMoreThanTheFirst) {
  for (const Zeros zeros : {Zeros::kSymmetricV1, Zeros::kAsymmetricV1}) {
    for (const Order order : {Order::kNone, Order::kActOrder}) {
      for (const std::uint64_t odd : {0U, 1U, 5U, 8U}) {
        SCOPED_TRACE(odd);
        std::vector<PackCase> cases;
        std::vector<Bytes> wanted;
        const test::StackNeeds needs{.zeros = zeros == Zeros::kAsymmetricV1,
                                     .source = order == Order::kActOrder};
        for (std::uint64_t e = 0; e < 9; ++e) {
          cases.push_back({.what = "",
                           .parts = {make_layer({.k = 320,
                                                 .n = 96,
                                                 .group_size = 32,
                                                 .zeros = e == odd ? zeros : Zeros::kSymmetricV1,
                                                 .order = e == odd ? order : Order::kNone,
                                                 .seed = e + 1})}});
          wanted.push_back(test::packed_by_definition(cases.back().parts, needs));
        }
        check_stack(cases, wanted);
      }
    }
  }
}

// Groups of other sizes, rows in plain order, zero points: what one expert needs, all have, and the
// codes of each are at the places of its own.
TEST_F(LoadTest, ExpertsOfDifferentOrdersShareOneLayout) {
  std::vector<Order> orders = {Order::kNone, Order::kUnbalanced, Order::kActOrder};
  for (std::size_t first = 0; first < orders.size();
       ++first) {  // that the others are compared with
    std::vector<Layer> layers;
    layers.reserve(orders.size());  // tensors are views into them
    std::vector<GptqTensors> tensors;
    std::vector<GptqWeights> weights;
    for (const Order order : orders) {
      layers.push_back(
          make_layer({.bits = 4,
                      .k = 320,
                      .n = 96,
                      .group_size = 32,
                      .zeros = order == Order::kNone ? Zeros::kSymmetricV1 : Zeros::kAsymmetricV1,
                      .order = order,
                      .seed = layers.size() + 1}));
      tensors.push_back(layers.back().tensors());
      weights.push_back(validate(tensors.back(), layers.back().spec()));
    }
    GptqSpec spec = layers.front().spec();
    spec.symmetry = Symmetry::kUnknown;
    Uploader uploader(0, small_sizes());
    const DeviceWeight stack = load(uploader, tensors, spec);
    const Bytes bytes = bytes_of(stack);
    const std::vector<cuda::sm80::LayerPlan> plans = cuda::sm80::plan_experts(weights);
    for (std::size_t e = 0; e < plans.size(); ++e) {
      EXPECT_EQ(plans[e].bytes, stack.expert_bytes);
      const cuda::sm80::SegmentPlan& segment = plans[e].segments.front();
      EXPECT_TRUE(segment.has_source);
      EXPECT_TRUE(segment.layout.has_zeros);
      EXPECT_EQ(segment.chunk_shift, -1);
      EXPECT_EQ(static_cast<std::int64_t>(segment.source.size()),
                segment.layout.chunks * cuda::sm80::Layout::kChunkRows);
      // Each input row once, and its codes where its packed row is.
      const unsigned char* const expert =
          bytes.data() + static_cast<std::int64_t>(e) * stack.expert_bytes;
      std::vector<std::int32_t> source(segment.source.size());
      std::memcpy(source.data(), expert + segment.places.source, source.size() * 4);
      std::vector<int> seen(320);
      for (std::size_t packed = 0; packed < source.size(); ++packed) {
        if (source[packed] < 0) continue;
        const auto row = static_cast<std::size_t>(source[packed]);
        ++seen.at(row);
        for (std::size_t feature = 0; feature < 96; ++feature) {
          const test::CodePlace place =
              test::code_place(static_cast<std::int64_t>(feature),
                               static_cast<std::int64_t>(packed), segment.layout.chunks, 4);
          std::uint32_t word = 0;
          std::memcpy(&word, expert + segment.places.codes + 4 * place.word, 4);
          ASSERT_EQ(place.code_in(word), layers[e].codes[row * 96 + feature])
              << "expert " << e << ", row " << row << ", feature " << feature;
        }
      }
      EXPECT_EQ(seen, std::vector<int>(320, 1)) << "expert " << e;
    }
    std::rotate(orders.begin(), orders.begin() + 1, orders.end());
  }
}

TEST_F(LoadTest, AnySourceGivesTheSameBytes) {
  Uploader uploader(0, small_sizes());
  for (const Source source : kSources) {
    for (std::size_t i = 0; i < cases().size(); i += 3) {
      ASSERT_TRUE(same(bytes_of(load(uploader, cases()[i], source)), expected(i)))
          << cases()[i].what << ", source " << static_cast<int>(source);
    }
  }
}

TEST_F(LoadTest, LargeLayersFromAnySource) {
  Uploader uploader(0);
  for (const PackCase& one : test::large_pack_cases()) {
    const Bytes wanted = test::packed_by_definition(one.parts);
    for (const Source source :
         {Source::kPageable, Source::kMisaligned, Source::kMisalignedPinned, Source::kMapped}) {
      ASSERT_TRUE(same(bytes_of(load(uploader, one, source)), wanted))
          << one.what << ", source " << static_cast<int>(source);
    }
  }
}

TEST_F(LoadTest, WithoutThreads) {
  UploadSizes sizes = small_sizes();
  sizes.ring.threads = 0;
  Uploader uploader(0, sizes);
  for (std::size_t i = 0; i < cases().size(); i += 5) {
    ASSERT_TRUE(same(bytes_of(load(uploader, cases()[i])), expected(i))) << cases()[i].what;
  }
}

// Threads which have nothing to do go to sleep, and come back.
TEST_F(LoadTest, LoadsFarApart) {
  Uploader uploader(0, small_sizes());
  for (std::size_t i = 0; i < cases().size(); i += 4) {
    const DeviceWeight weight = load(uploader, cases()[i]);
    ASSERT_TRUE(same(bytes_of(weight), expected(i))) << cases()[i].what;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

TEST_F(LoadTest, OnePieceTakesAllSlotsManyTimes) {
  const PackCase one = test::large_pack_cases().front();
  const Bytes wanted = test::packed_by_definition(one.parts);
  for (const unsigned threads : {0U, 1U, 3U}) {
    Uploader uploader(0, {.ring = {.slot_bytes = 1024, .threads = threads}});
    for (const Source source : {Source::kPageable, Source::kMisaligned}) {
      ASSERT_TRUE(same(bytes_of(load(uploader, one, source)), wanted)) << threads;
    }
  }
}

TEST_F(LoadTest, ThreadsLoadAtOnce) {
  (void)expected(0);
  std::vector<std::string> wrong(8);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < wrong.size(); ++t) {
    threads.emplace_back([t, &wrong] {
      try {
        Uploader uploader(0, t % 2 == 0 ? small_sizes() : UploadSizes{});
        std::vector<std::pair<std::size_t, DeviceWeight>> weights;
        for (std::size_t i = t; i < cases().size(); i += 5) {
          weights.emplace_back(i, load(uploader, cases()[i], kSources[i % std::size(kSources)]));
        }
        for (const auto& [i, weight] : weights) {
          const ::testing::AssertionResult result = same(bytes_of(weight), expected(i));
          if (!result) wrong[t] += cases()[i].what + ": " + result.message() + "\n";
        }
      } catch (const std::exception& error) {
        wrong[t] = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& message : wrong) EXPECT_EQ(message, "");
}

// What kernels are told of a segment.
TEST_F(LoadTest, ViewsAreThoseOfThePlan) {
  Uploader uploader(0);
  for (const PackCase& one : cases()) {
    SCOPED_TRACE(one.what);
    const GptqTensors tensors = one.tensors();
    const cuda::sm80::LayerPlan plan = cuda::sm80::plan_layer(validate(tensors, one.spec()));
    const DeviceWeight weight = load(uploader, one);
    const auto* memory = static_cast<const unsigned char*>(weight.memory.data());
    ASSERT_EQ(weight.segments.size(), plan.segments.size());
    for (std::size_t i = 0; i < plan.segments.size(); ++i) {
      const cuda::sm80::SegmentPlan& s = plan.segments[i];
      const WeightView& view = weight.segments[i].view;
      const auto at = [memory](std::int64_t place) -> const void* {
        return place < 0 ? nullptr : memory + place;
      };
      EXPECT_EQ(weight.segments[i].first_feature, s.first_feature);
      EXPECT_EQ(static_cast<const void*>(view.codes), at(s.places.codes));
      EXPECT_EQ(static_cast<const void*>(view.groups), at(s.places.groups));
      EXPECT_EQ(static_cast<const void*>(view.chunk_groups), at(s.places.chunk_groups));
      EXPECT_EQ(static_cast<const void*>(view.source), at(s.places.source));
      EXPECT_EQ(static_cast<const void*>(view.bias), at(s.places.bias));
      EXPECT_EQ(view.n, s.layout.n);
      EXPECT_EQ(view.k, one.parts[0].options.k);
      EXPECT_EQ(view.chunks, s.layout.chunks);
      EXPECT_EQ(view.num_groups, s.layout.groups);
      EXPECT_EQ(view.has_zeros, s.layout.has_zeros);
      EXPECT_EQ(view.middle, 1 << (one.parts[0].options.bits - 1));
      EXPECT_TRUE(view.scales_divide);
      EXPECT_TRUE(view.small_scales);
    }
    if (HasFailure()) return;
  }
}

TEST_F(LoadTest, ScalesThatAreTooFarApartDoNotDivide) {
  Uploader uploader(0);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const double scale : {0x1p-31, 0x1p31, -0x1p-100}) {
      PackCase one{.what = "", .parts = {make_layer({.n = 70, .scales = dtype})}};
      test::write_element(one.parts[0].scales.data(), dtype, 69, scale);
      EXPECT_FALSE(load(uploader, one).segments[0].view.scales_divide) << scale;
    }
  }
  PackCase least{.what = "", .parts = {make_layer({.n = 70, .scales = DType::kFloat16})}};
  test::write_element(least.parts[0].scales.data(), DType::kFloat16, 3, 0x1p-24);
  EXPECT_TRUE(load(uploader, least).segments[0].view.scales_divide);
}

// With scales of bfloat16 that float16 holds.
Layer layer_of_halves() {
  Layer layer = make_layer({.n = 70, .scales = DType::kBFloat16});
  for (std::int64_t i = 0; i < layer.groups * 70; ++i) {
    const double scale = test::read_element(layer.scales.data(), DType::kBFloat16, i);
    if (scale < 0x1p-17) test::write_element(layer.scales.data(), DType::kBFloat16, i, 0.01);
  }
  return layer;
}

TEST_F(LoadTest, BFloat16ScalesThatFloat16HoldsBecomeFloat16) {
  Uploader uploader(0);
  const auto layer_with = [](double scale) {
    PackCase one{.what = "", .parts = {layer_of_halves()}};
    test::write_element(one.parts[0].scales.data(), DType::kBFloat16, 69, scale);
    return one;
  };
  // The least that it holds with 8 bits, all of which the second has, and the most.
  for (const double scale : {0x1p-17, -0x1.fep-17, 0x1.fep-15, 0x1.fep15, -0x1.fep15, 0.0, -0.0}) {
    const PackCase one = layer_with(scale);
    const DeviceWeight weight = load(uploader, one);
    EXPECT_EQ(weight.segments[0].view.scale_type, cuda::FloatType::kF16) << scale;
    EXPECT_TRUE(same(bytes_of(weight), test::packed_by_definition(one.parts))) << scale;
  }
  for (const double scale : {0x1.fep-18, -0x1p-100, 0x1p16, -0x1p100}) {
    const PackCase one = layer_with(scale);
    const DeviceWeight weight = load(uploader, one);
    EXPECT_EQ(weight.segments[0].view.scale_type, cuda::FloatType::kBF16) << scale;
    EXPECT_TRUE(same(bytes_of(weight), test::packed_by_definition(one.parts))) << scale;
  }
}

// All experts of a stack have the same kernels.
TEST_F(LoadTest, BFloat16ScalesOfAStackBecomeFloat16Together) {
  for (const double scale : {0x1p-17, 0x1p-18}) {
    const bool is_half = scale >= 0x1p-17;
    std::vector<PackCase> experts;
    for (int e = 0; e < 3; ++e) experts.push_back({.what = "", .parts = {layer_of_halves()}});
    test::write_element(experts[1].parts[0].scales.data(), DType::kBFloat16, 3, scale);
    std::vector<Bytes> expected;
    for (const PackCase& one : experts) {
      expected.push_back(test::packed_by_definition(
          one.parts, {}, is_half ? test::ScaleTypes::kLoaded : test::ScaleTypes::kOfFile));
    }
    check_stack(experts, expected, is_half ? cuda::FloatType::kF16 : cuda::FloatType::kBF16);
  }
}

TEST_F(LoadTest, ScalesAreSmallUpTo64) {
  Uploader uploader(0);
  for (const auto& [scale, small] :
       {std::pair{64.0, true}, {-64.0, true}, {65.0, false}, {-65.0, false}}) {
    PackCase one{.what = "", .parts = {make_layer({.n = 70, .scales = DType::kFloat16})}};
    test::write_element(one.parts[0].scales.data(), DType::kFloat16, 69, scale);
    EXPECT_EQ(load(uploader, one).segments[0].view.small_scales, small) << scale;
  }
}

// --- memory ---

std::int64_t raw_bytes(const PackCase& one) {
  const GptqTensors tensors = one.tensors();
  return cuda::raw_bytes(check_structure(tensors, one.spec()));
}

// Two pieces of a megabyte where a layer is less, and 256 KB for alignment.
constexpr std::int64_t kConstant = (std::int64_t{2} << 20) + (std::int64_t{256} << 10);

TEST_F(LoadTest, PeakIsThePackedLayersAndOneLayersTensors) {
  Uploader uploader(0);
  std::vector<DeviceWeight> weights;
  std::int64_t packed = bytes_before_;
  std::int64_t raw = 0;
  std::vector<PackCase> all = test::large_pack_cases();
  std::copy(cases().begin(), cases().begin() + 20, std::back_inserter(all));
  for (const Source source : {Source::kPageable, Source::kPinned}) {
    for (const PackCase& one : all) {
      DeviceMemory::forget_peak();
      weights.push_back(load(uploader, one, source));
      packed += weights.back().memory.size() * 4;
      raw = std::max(raw, raw_bytes(one));
      EXPECT_LE(DeviceMemory::peak(), packed + raw + kConstant) << one.what;
    }
  }
  weights.clear();
  EXPECT_LE(DeviceMemory::bytes() - bytes_before_, raw + kConstant);
}

// Small experts travel together, in a part of the stack's bytes that is bounded.
TEST_F(LoadTest, PeakOfAStackIsThePackedExpertsAndAFewOfTheirTensors) {
  constexpr std::int64_t kOfStack = 20480;
  const PackCase one{.what = "", .parts = {make_layer({.k = 128, .n = 128, .group_size = 32})}};
  const std::vector<GptqTensors> experts(200, one.tensors());
  EXPECT_LT(2 * raw_bytes(one), kOfStack);
  Uploader uploader(0, {.least_piece = 1024, .of_stack = kOfStack});
  for (int round = 0; round < 2; ++round) {
    DeviceMemory::forget_peak();
    const DeviceWeight stack = load(uploader, experts, one.spec());
    EXPECT_LE(DeviceMemory::peak(), bytes_before_ + stack.memory.size() * 4 + 2 * kOfStack + 512);
    stack.ready.wait();
  }
}

// A piece is 64 columns and all rows at least: here more than what staging may keep.
TEST_F(LoadTest, StagingOfAnOversizePieceIsGivenBack) {
  const PackCase large{
      .what = "",
      .parts = {make_layer(
          {.bits = 8, .k = 4096, .n = 100, .group_size = 1024, .order = Order::kActOrder})}};
  const PackCase small{.what = "", .parts = {make_layer({.n = 40})}};
  Uploader uploader(0, small_sizes());
  for (int round = 0; round < 3; ++round) {
    DeviceMemory::forget_peak();
    const DeviceWeight weight = load(uploader, large);
    EXPECT_LE(DeviceMemory::peak(),
              bytes_before_ + weight.memory.size() * 4 + raw_bytes(large) + kConstant);
    EXPECT_EQ(DeviceMemory::bytes(), bytes_before_ + weight.memory.size() * 4);
    EXPECT_TRUE(same(bytes_of(weight), test::packed_by_definition(large.parts)));
    EXPECT_TRUE(same(bytes_of(load(uploader, small)), test::packed_by_definition(small.parts)));
  }
}

TEST_F(LoadTest, OutOfMemoryAnywhereLeavesTheUploaderUsable) {
  const PackCase one = test::large_pack_cases().front();
  const Bytes wanted = test::packed_by_definition(one.parts);
  for (const bool fresh : {true, false}) {
    bool failed = true;
    for (int n = 1; failed; ++n) {
      Uploader uploader(0, {.ring = {.threads = 3}});
      if (!fresh) (void)load(uploader, cases()[0]);
      const std::int64_t before = DeviceMemory::bytes();
      Tensors tensors(one, Source::kPageable);
      failed = false;
      DeviceMemory::fail_allocation(n);
      try {
        const DeviceWeight packed = load(uploader, {&tensors.layer(), 1}, one.spec());
        EXPECT_TRUE(same(bytes_of(packed), wanted)) << n;
        // Staging, pinned memory of the caller's and of the threads', which may be short, and the
        // layer itself.
        failed = n < 4;
      } catch (const Error& error) {
        failed = true;
        EXPECT_EQ(error.code(), ErrorCode::kOutOfMemory) << error.what();
        EXPECT_NE(std::string(error.what()).find("cannot allocate"), std::string::npos);
        EXPECT_NE(std::string(error.what()).find(" bytes"), std::string::npos);
      }
      DeviceMemory::fail_allocation(0);
      tensors.take_away();
      EXPECT_LE(DeviceMemory::bytes(), before + raw_bytes(one) + kConstant);
      EXPECT_TRUE(same(bytes_of(load(uploader, one)), wanted)) << n;
      ASSERT_LT(n, 100);
    }
  }
}

TEST_F(LoadTest, PinnedMemoryIsEnoughForTheCallerAlone) {
  constexpr std::int64_t kOfAThread = 2 * 512;
  for (const std::int64_t threads : {0, 1, 2, 3}) {
    Uploader uploader(0, small_sizes());
    DeviceMemory::limit_pinned(pinned_before_ + kOfAThread - 1);
    test::expect_error(ErrorCode::kOutOfMemory,
                       {"cannot allocate 1024 bytes of pinned host memory"},
                       [&] { (void)load(uploader, cases()[0]); });
    DeviceMemory::limit_pinned(pinned_before_ + (threads + 1) * kOfAThread);
    for (std::size_t i = 0; i < cases().size(); i += 5) {
      ASSERT_TRUE(same(bytes_of(load(uploader, cases()[i])), expected(i))) << cases()[i].what;
    }
    // Half as many where there is not enough for all.
    EXPECT_EQ(DeviceMemory::pinned_bytes() - pinned_before_,
              ((threads == 2 ? 1 : threads) + 1) * kOfAThread);
    DeviceMemory::limit_pinned(0);
    EXPECT_TRUE(same(bytes_of(load(uploader, cases()[1])), expected(1)));
  }
}

// Threads are at any point of a copy when it is given up, and the tensors go at once.
TEST_F(LoadTest, AnUploadThatIsGivenUpReadsNothingMore) {
  const PackCase one = test::large_pack_cases().front();
  const Bytes wanted = test::packed_by_definition(one.parts);
  UploadSizes sizes;
  sizes.ring = {.slot_bytes = 4096, .threads = 3};
  Uploader uploader(0, sizes);
  for (int round = 0; round < 20; ++round) {
    Tensors tensors(one, Source::kPageable);
    const GptqSpec spec = one.spec();
    LayersToLoad layers({&tensors.layer(), 1}, spec);
    {
      LayerUpload upload(uploader, layers);
      std::this_thread::sleep_for(std::chrono::microseconds(50 * round));
      if (round % 4 == 3) (void)upload.next();
    }
    tensors.take_away();
    if (round % 5 != 0) continue;
    ASSERT_TRUE(same(bytes_of(load(uploader, one)), wanted)) << round;
  }
}

// What validation refuses has been on its way already.
TEST_F(LoadTest, ARefusedLayerIsLetGo) {
  PackCase bad = test::large_pack_cases().front();
  test::write_element(bad.parts[0].scales.data(), DType::kFloat16, 77,
                      std::numeric_limits<double>::infinity());
  for (const Source source : kSources) {
    Uploader uploader(0);
    Tensors tensors(bad, source);
    test::expect_refused({"layer.scales", "expected a finite number"},
                         [&] { (void)load(uploader, {&tensors.layer(), 1}, bad.spec()); });
    tensors.take_away();
    ASSERT_TRUE(same(bytes_of(load(uploader, cases()[1], source)), expected(1)));
  }
}

// The experts before it have been packed already.
TEST_F(LoadTest, ARefusedExpertIsNamedAndTheStackLetGo) {
  std::vector<PackCase> good;
  for (std::uint64_t e = 0; e < 12; ++e) {
    good.push_back({.what = "",
                    .parts = {make_layer({.k = 256,
                                          .n = 90,
                                          .group_size = 32,
                                          .seed = e + 1,
                                          .name = "experts." + std::to_string(e)})}});
  }
  std::vector<PackCase> infinite = good;
  test::write_element(infinite[9].parts[0].scales.data(), DType::kFloat16, 77,
                      std::numeric_limits<double>::infinity());
  std::vector<PackCase> narrow = good;
  narrow[10].parts[0] = make_layer({.k = 256, .n = 80, .group_size = 32, .name = "experts.10"});
  for (const Source source : kSources) {
    Uploader uploader(0, small_sizes());
    const auto refused = [&](const std::vector<PackCase>& experts, std::string_view words) {
      std::vector<std::unique_ptr<Tensors>> tensors;
      std::vector<GptqTensors> layers;
      for (const PackCase& one : experts) {
        tensors.push_back(std::make_unique<Tensors>(one, source));
        layers.push_back(tensors.back()->layer());
      }
      GptqSpec spec = good.front().spec();
      spec.n = 0;
      test::expect_refused({words}, [&] { (void)load(uploader, layers, spec); });
    };
    refused(infinite, "experts.9.scales: element [0, 77] is inf, expected a finite number");
    refused(narrow, "experts[10] experts.10: n = 80, expected 90 as in experts[0]");
    ASSERT_TRUE(same(bytes_of(load(uploader, cases()[1], source)), expected(1)));
  }
}

}  // namespace
}  // namespace marlinq
