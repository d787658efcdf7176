// DLPack: the C structures of its ABI, version 0.x of the exchange ("dltensor" capsules), and the
// two directions over them. Declared after the specification at https://dmlc.github.io/dlpack; the
// only file that knows the ABI.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "marlinq/types.hpp"

namespace marlinq::bindings {

/// An array that another library owns, kept alive by this object.
struct BorrowedArray {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device = {};
  bool read_only = false;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;  // elements
  std::shared_ptr<void> owner;
};

/// How DLPack calls CUDA's legacy default stream.
inline constexpr std::int64_t kLegacyDefaultStream = 1;

/// Takes an object's array through its __dlpack__(). Work on a device will be on `stream`, as DLPack
/// numbers them. `name` goes into messages. Throws invalid_argument.
BorrowedArray import_dlpack(pybind11::handle object, std::string_view name, std::int64_t stream);

/// A "dltensor" capsule over memory that `owner` keeps alive.
pybind11::capsule export_dlpack(const BorrowedArray& array);

}  // namespace marlinq::bindings
