// A backend that overrides nothing: all of its operations are the defaults of the trait.
#pragma once

#include <cstdint>

#include "marlinq/backend.hpp"
#include "marlinq/registry.hpp"

namespace marlinq::test {

struct NullContext {
  Device where = {DeviceKind::kCuda, 3};

  Device device() const { return where; }
  // What a handle asks of a context, beyond the concept.
  int threads() const { return 1; }
  std::int64_t scratch_allocations() const { return 0; }
};

struct NullBuffer {
  Device device() const { return {DeviceKind::kCuda, 3}; }
  DType dtype() const { return DType::kFloat32; }
  std::int64_t size() const { return 0; }
  void* data() { return nullptr; }
};

struct NullBackend : QuantMarlinDefaults<NullBackend> {
  static constexpr std::string_view kName = "null";
  using Context = NullContext;
  using Buffer = NullBuffer;
};

static_assert(Backend<NullBackend>);
static_assert(BackendQuantMarlin<NullBackend>);

// What is missing a part of the concept is not a backend.
struct NamelessBackend : QuantMarlinDefaults<NamelessBackend> {
  using Context = NullContext;
  using Buffer = NullBuffer;
};
struct StatefulBackend : NullBackend {
  int state = 0;
};
struct BareBackend {  // without the defaults
  static constexpr std::string_view kName = "bare";
  using Context = NullContext;
  using Buffer = NullBuffer;
};
static_assert(!Backend<NamelessBackend>);
static_assert(!Backend<StatefulBackend>);
static_assert(Backend<BareBackend> && !BackendQuantMarlin<BareBackend>);

}  // namespace marlinq::test
