// Python arrays as the library's views: numpy by its buffer, everything else by DLPack, never a
// copy.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "bindings/dlpack.hpp"
#include "marlinq/gptq.hpp"
#include "marlinq/handle.hpp"
#include "marlinq/types.hpp"

namespace marlinq::bindings {

/// A numpy array (ml_dtypes' bfloat16 included), a buffer of ours or a DLPack object. Throws
/// invalid_argument.
BorrowedArray borrow(pybind11::handle object, std::string_view name,
                     std::int64_t stream = kLegacyDefaultStream);

/// "float16" and so on. Throws invalid_argument.
DType named_dtype(std::string_view name);

/// The stream of a context for borrow().
std::int64_t stream_of(const ContextHandle& context);

/// [..., cols] as a matrix; leading axes must collapse into one row stride. A vector is one row.
ConstMatrixView as_matrix(const BorrowedArray& array, std::string_view name);

/// The same for memory that is written. Throws invalid_argument also for a read-only array.
MatrixView as_output(const BorrowedArray& array, std::string_view name);

/// A contiguous array of any rank as one dimension.
ConstArrayView as_flat(const BorrowedArray& array, std::string_view name);

/// The arrays of one call on a context: views of them for as long as this object lives, and whether the
/// call has to copy.
class CallArrays {
 public:
  explicit CallArrays(const ContextHandle& context)
      : stream_(stream_of(context)), device_(context.device()) {}

  /// As as_matrix, as_output and as_flat, and which array it was. Throw invalid_argument.
  ConstMatrixView matrix(pybind11::handle object, std::string_view name);
  MatrixView output(pybind11::handle object, std::string_view name);
  ConstArrayView flat(pybind11::handle object, std::string_view name);
  /// The same for what may be None.
  std::optional<ConstMatrixView> optional_matrix(pybind11::handle object, std::string_view name);
  std::optional<ConstArrayView> optional_flat(pybind11::handle object, std::string_view name);

  /// Whether to call the *_host function of a handle: numpy knows of no device, so its arrays are
  /// copied. Arrays of libraries that do are expected to lie where the weight is: throws
  /// invalid_argument where one of them is in host memory beside one of numpy.
  bool copied() const;

 private:
  struct Taken {
    BorrowedArray array;
    std::string_view name;  // a literal
    bool numpy;
  };

  const BorrowedArray& take(pybind11::handle object, std::string_view name);

  std::int64_t stream_;
  Device device_;
  std::vector<Taken> taken_;
};

/// A tensor of a checkpoint, kept alive by this object.
struct OwnedTensor {
  HostTensor tensor;
  pybind11::object owner;
};

/// None is an absent tensor.
OwnedTensor to_tensor(pybind11::handle object, std::string_view name);

/// HostTensor and HostBuffer, and after Context is bound DeviceBuffer.
void bind_arrays(pybind11::module_& module);
void bind_device_buffer(pybind11::module_& module);

}  // namespace marlinq::bindings
