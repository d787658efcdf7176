// Python arrays as the library's views: numpy by its buffer, everything else by DLPack, never a
// copy.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string_view>

#include "bindings/dlpack.hpp"
#include "marlinq/gptq.hpp"
#include "marlinq/handle.hpp"
#include "marlinq/types.hpp"

namespace marlinq::bindings {

/// A numpy array (ml_dtypes' bfloat16 included), a buffer of ours or a DLPack object. Throws
/// invalid_argument.
BorrowedArray borrow(pybind11::handle object, std::string_view name,
                     std::int64_t stream = kLegacyDefaultStream);

/// The stream of a context for borrow().
std::int64_t stream_of(const ContextHandle& context);

/// Whether the object is a numpy array.
bool is_numpy(pybind11::handle object);

/// [..., cols] as a matrix; leading axes must collapse into one row stride. A vector is one row.
ConstMatrixView as_matrix(const BorrowedArray& array, std::string_view name);

/// The same for memory that is written. Throws invalid_argument also for a read-only array.
MatrixView as_output(const BorrowedArray& array, std::string_view name);

/// A contiguous array of any rank as one dimension.
ConstArrayView as_flat(const BorrowedArray& array, std::string_view name);

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
