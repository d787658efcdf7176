#include "bindings/arrays.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/concat.hpp"
#include "core/refuse.hpp"
#include "marlinq/error.hpp"

namespace py = pybind11;

namespace marlinq::bindings {
namespace {

std::optional<DType> parse_dtype(std::string_view name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "int32" || name == "uint32") return DType::kInt32;
  if (name == "int64") return DType::kInt64;
  return std::nullopt;
}

// The dtype of numpy's own types in native byte order, without the name, which numpy makes in Python.
std::optional<DType> builtin_dtype(const py::dtype& dtype) {
  constexpr int kBuiltinTypes = 24;  // numbers of other libraries' types begin above
  const char order = dtype.byteorder();
  if (dtype.num() >= kBuiltinTypes || (order != '=' && order != '|')) return std::nullopt;
  const char kind = dtype.kind();
  switch (dtype.itemsize()) {
    case 2:
      if (kind == 'f') return DType::kFloat16;
      break;
    case 4:
      if (kind == 'f') return DType::kFloat32;
      if (kind == 'i' || kind == 'u') return DType::kInt32;
      break;
    case 8:
      if (kind == 'i') return DType::kInt64;
      break;
    default:
      break;
  }
  return std::nullopt;
}

DType numpy_dtype(const py::dtype& dtype, std::string_view name) {
  if (const std::optional<DType> builtin = builtin_dtype(dtype)) return *builtin;
  const auto dtype_name = py::cast<std::string>(dtype.attr("name"));
  const std::optional<DType> parsed = parse_dtype(dtype_name);
  if (!parsed || !py::cast<bool>(dtype.attr("isnative"))) {
    refuse_argument(concat(name, ": dtype ", dtype_name, parsed ? " in foreign byte order" : "",
                           ", expected float32, float16, bfloat16, int32 or int64"));
  }
  return *parsed;
}

bool is_numpy(py::handle object) { return py::isinstance<py::array>(object); }

std::shared_ptr<void> keep_alive(py::object object) {
  auto* holder = new py::object(std::move(object));
  return {holder, [](void* pointer) {
            const py::gil_scoped_acquire gil;
            delete static_cast<py::object*>(pointer);
          }};
}

BorrowedArray borrow_numpy(const py::array& array, std::string_view name) {
  const DType dtype = numpy_dtype(array.dtype(), name);
  BorrowedArray borrowed;
  borrowed.dtype = dtype;
  borrowed.read_only = !array.writeable();
  borrowed.data = const_cast<void*>(array.data());
  const auto size = static_cast<py::ssize_t>(size_of(dtype));
  for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) {
    borrowed.shape.push_back(array.shape(axis));
    if (array.strides(axis) % size != 0) {
      refuse_argument(concat(name, ": stride of ", array.strides(axis), " bytes on axis ", axis,
                             ", expected a multiple of ", size));
    }
    borrowed.strides.push_back(array.strides(axis) / size);
  }
  borrowed.owner = keep_alive(array);
  return borrowed;
}

std::string shape_text(const BorrowedArray& array) {
  std::string text = "[";
  for (std::size_t i = 0; i < array.shape.size(); ++i)
    text += concat(i > 0 ? ", " : "", array.shape[i]);
  return text + "]";
}

std::int64_t element_count(const BorrowedArray& array) {
  std::int64_t count = 1;
  for (const std::int64_t extent : array.shape) count *= extent;
  return count;
}

bool is_contiguous(const BorrowedArray& array) {
  if (element_count(array) == 0) return true;
  std::int64_t step = 1;
  for (std::size_t axis = array.shape.size(); axis-- > 0;) {
    if (array.shape[axis] != 1 && array.strides[axis] != step) return false;
    step *= array.shape[axis];
  }
  return true;
}

template <class View>
View matrix_view(const BorrowedArray& array, std::string_view name) {
  if (array.shape.empty()) refuse_argument(concat(name, ": no dimensions, expected at least one"));
  View view{.data = array.data,
            .dtype = array.dtype,
            .device = array.device,
            .rows = 1,
            .cols = array.shape.back(),
            .row_stride = array.shape.back()};
  const std::size_t last = array.shape.size() - 1;
  for (std::size_t axis = 0; axis < last; ++axis) view.rows *= array.shape[axis];
  if (view.rows == 0 || view.cols == 0) return view;
  if (view.cols > 1 && array.strides[last] != 1) {
    refuse_argument(concat(name, ": stride ", array.strides[last],
                           " along the last axis, expected 1 (contiguous rows)"));
  }
  // Leading axes of more than one element, innermost first, each the size of all inside it times
  // their stride.
  std::int64_t rows = 1;
  for (std::size_t axis = last; axis-- > 0;) {
    if (array.shape[axis] == 1) continue;
    if (rows == 1) view.row_stride = array.strides[axis];
    if (array.strides[axis] != view.row_stride * rows) {
      refuse_argument(concat(
          name, ": the leading axes of shape ", shape_text(array),
          " have no common row stride, expected ones that reshape to a matrix without a copy"));
    }
    rows *= array.shape[axis];
  }
  return view;
}

class PyHostTensor {
 public:
  PyHostTensor(const py::object& buffer, const std::optional<std::string>& dtype,
               const std::optional<std::vector<std::int64_t>>& shape) {
    if (!dtype && !shape) {
      BorrowedArray array = borrow(buffer, "tensor");
      if (array.device.kind != DeviceKind::kCpu) {
        refuse_argument(concat("tensor: on ", to_string(array.device), ", expected host memory"));
      }
      if (!is_contiguous(array))
        refuse_argument(concat("tensor: shape ", shape_text(array), " is not contiguous"));
      set_shape(array.shape);
      tensor_.data = array.data;
      tensor_.dtype = array.dtype;
      tensor_.bytes = static_cast<std::size_t>(element_count(array)) * size_of(array.dtype);
      owner_ = py::capsule(new std::shared_ptr<void>(array.owner),
                           [](void* p) { delete static_cast<std::shared_ptr<void>*>(p); });
      return;
    }
    if (!dtype || !shape) refuse_argument("tensor: dtype and shape go together");
    const std::optional<DType> parsed = parse_dtype(*dtype);
    if (!parsed)
      refuse_argument(concat("tensor: dtype ", *dtype,
                             ", expected float32, float16, bfloat16, int32 or int64"));
    if (!py::isinstance<py::buffer>(buffer)) {
      refuse_argument(
          concat("tensor: ", std::string(py::str(py::type::of(buffer).attr("__name__"))),
                 ", expected a contiguous buffer of bytes"));
    }
    view_ = py::cast<py::buffer>(buffer).request();
    if (view_->ndim != 1 || view_->strides[0] != view_->itemsize)
      refuse_argument("tensor: the buffer is not contiguous bytes");
    set_shape(*shape);
    tensor_.data = view_->ptr;
    tensor_.dtype = *parsed;
    tensor_.bytes = static_cast<std::size_t>(view_->size * view_->itemsize);
    owner_ = buffer;
  }

  const HostTensor& tensor() const noexcept { return tensor_; }

  py::typing::Tuple<py::int_, py::ellipsis> shape() const {
    py::tuple shape(tensor_.rank);
    for (int i = 0; i < tensor_.rank; ++i)
      shape[static_cast<std::size_t>(i)] = tensor_.shape[static_cast<std::size_t>(i)];
    return shape;
  }

 private:
  void set_shape(const std::vector<std::int64_t>& shape) {
    if (shape.empty() || shape.size() > tensor_.shape.size()) {
      refuse_argument(concat("tensor: ", shape.size(), " dimensions, expected 1 or 2"));
    }
    tensor_.rank = static_cast<int>(shape.size());
    std::copy(shape.begin(), shape.end(), tensor_.shape.begin());
  }

  HostTensor tensor_;
  py::object owner_;
  std::optional<py::buffer_info> view_;
};

/// Gives an array the strides of contiguous memory. Returns its elements. Throws invalid_argument or
/// out_of_memory.
std::int64_t set_contiguous(BorrowedArray& array, std::vector<std::int64_t> shape) {
  array.shape = std::move(shape);
  array.strides.resize(array.shape.size());
  std::int64_t step = 1;
  for (std::size_t axis = array.shape.size(); axis-- > 0;) {
    if (array.shape[axis] < 0)
      refuse_argument(concat("shape: ", shape_text(array), ", expected no negative extent"));
    array.strides[axis] = step;
    if (__builtin_mul_overflow(step, array.shape[axis], &step)) {
      throw Error(ErrorCode::kOutOfMemory,
                  concat("cannot allocate an array of shape ", shape_text(array)));
    }
  }
  return step;
}

/// Zeroed host memory that other libraries take over by DLPack.
class PyBuffer {
 public:
  PyBuffer(std::vector<std::int64_t> shape, const std::string& dtype) {
    array_.dtype = named_dtype(dtype);
    const std::int64_t elements = set_contiguous(array_, std::move(shape));
    // Zeroed, so that rows which a call leaves alone are defined.
    array_.owner = std::shared_ptr<void>(
        std::calloc(static_cast<std::size_t>(std::max<std::int64_t>(elements, 1)),
                    size_of(array_.dtype)),
        std::free);
    if (array_.owner == nullptr) {
      throw Error(ErrorCode::kOutOfMemory, concat("cannot allocate an array of shape ",
                                                  shape_text(array_), " and dtype ", dtype));
    }
    array_.data = array_.owner.get();
  }

  const BorrowedArray& array() const noexcept { return array_; }

 private:
  BorrowedArray array_;
};

/// The same on a context's device, written by the context's stream.
class PyDeviceBuffer {
 public:
  PyDeviceBuffer(ContextHandle context, std::vector<std::int64_t> shape, const std::string& dtype)
      : context_(std::move(context)) {
    array_.dtype = named_dtype(dtype);
    const std::int64_t elements = set_contiguous(array_, std::move(shape));
    auto buffer = std::make_shared<BufferHandle>(context_.allocate(array_.dtype, elements));
    array_.device = buffer->device();
    array_.data = buffer->data();
    array_.owner = std::move(buffer);
  }

  const BorrowedArray& array() const noexcept { return array_; }

  py::typing::Tuple<py::int_, py::ellipsis> shape() const {
    py::tuple shape(array_.shape.size());
    for (std::size_t i = 0; i < array_.shape.size(); ++i) shape[i] = array_.shape[i];
    return shape;
  }

  /// A consumer that names a stream, or leaves it open, may read at once.
  py::object export_for(const py::object& stream) const {
    constexpr int kNoWait = -1;
    if (stream.is_none() || py::cast<std::int64_t>(stream) != kNoWait) {
      const py::gil_scoped_release release;
      context_.synchronise();
    }
    return export_dlpack(array_);
  }

 private:
  ContextHandle context_;
  BorrowedArray array_;
};

}  // namespace

DType named_dtype(std::string_view name) {
  const std::optional<DType> parsed = parse_dtype(name);
  if (!parsed)
    refuse_argument(
        concat("dtype: ", name, ", expected float32, float16, bfloat16, int32 or int64"));
  return *parsed;
}

BorrowedArray borrow(py::handle object, std::string_view name, std::int64_t stream) {
  if (is_numpy(object)) return borrow_numpy(py::reinterpret_borrow<py::array>(object), name);
  if (py::isinstance<PyBuffer>(object)) return py::cast<const PyBuffer&>(object).array();
  if (py::isinstance<PyDeviceBuffer>(object)) {
    return py::cast<const PyDeviceBuffer&>(object).array();
  }
  return import_dlpack(object, name, stream);
}

std::int64_t stream_of(const ContextHandle& context) {
  // A null handle is the legacy default stream, which DLPack numbers otherwise.
  const auto stream = static_cast<std::int64_t>(reinterpret_cast<std::intptr_t>(context.stream()));
  return stream == 0 ? kLegacyDefaultStream : stream;
}

ConstMatrixView as_matrix(const BorrowedArray& array, std::string_view name) {
  return matrix_view<ConstMatrixView>(array, name);
}

MatrixView as_output(const BorrowedArray& array, std::string_view name) {
  if (array.read_only)
    refuse_argument(concat(name, ": read-only, expected an array that can be written"));
  return matrix_view<MatrixView>(array, name);
}

ConstArrayView as_flat(const BorrowedArray& array, std::string_view name) {
  if (!is_contiguous(array))
    refuse_argument(concat(name, ": shape ", shape_text(array), " is not contiguous"));
  return {.data = array.data,
          .dtype = array.dtype,
          .device = array.device,
          .size = element_count(array)};
}

const BorrowedArray& CallArrays::take(py::handle object, std::string_view name) {
  taken_.push_back({borrow(object, name, stream_), name, is_numpy(object)});
  return taken_.back().array;
}

ConstMatrixView CallArrays::matrix(py::handle object, std::string_view name) {
  return as_matrix(take(object, name), name);
}

MatrixView CallArrays::output(py::handle object, std::string_view name) {
  return as_output(take(object, name), name);
}

ConstArrayView CallArrays::flat(py::handle object, std::string_view name) {
  return as_flat(take(object, name), name);
}

std::optional<ConstMatrixView> CallArrays::optional_matrix(py::handle object,
                                                           std::string_view name) {
  if (object.is_none()) return std::nullopt;
  return matrix(object, name);
}

std::optional<ConstArrayView> CallArrays::optional_flat(py::handle object, std::string_view name) {
  if (object.is_none()) return std::nullopt;
  return flat(object, name);
}

bool CallArrays::copied() const {
  const auto numpy = [](const Taken& taken) { return taken.numpy; };
  if (std::none_of(taken_.begin(), taken_.end(), numpy)) return false;
  for (const Taken& taken : taken_) {
    if (device_.kind != DeviceKind::kCpu && !taken.numpy &&
        taken.array.device.kind == DeviceKind::kCpu) {
      refuse_argument(concat(taken.name, ": on ", to_string(taken.array.device), ", expected ",
                             to_string(device_), " or a numpy array"));
    }
  }
  return true;
}

OwnedTensor to_tensor(py::handle object, std::string_view name) {
  if (object.is_none()) return {};
  py::object owner;
  if (py::isinstance<PyHostTensor>(object)) {
    owner = py::reinterpret_borrow<py::object>(object);
  } else {
    try {
      owner = py::cast(
          PyHostTensor(py::reinterpret_borrow<py::object>(object), std::nullopt, std::nullopt));
    } catch (const Error& error) {
      std::string message = error.what();
      constexpr std::string_view kGeneric = "tensor";
      if (message.starts_with(kGeneric))
        message = std::string(name) + message.substr(kGeneric.size());
      throw Error(error.code(), message);
    }
  }
  const HostTensor tensor = py::cast<const PyHostTensor&>(owner).tensor();
  return {.tensor = tensor, .owner = std::move(owner)};
}

void bind_arrays(py::module_& module) {
  py::class_<PyHostTensor>(module, "HostTensor",
                           R"(A tensor in host memory that somebody else owns; nothing is copied.

Args:
    buffer: A numpy array or DLPack object, or with dtype and shape any contiguous bytes, at any alignment.
    dtype: "int32", "float32", "float16" or "bfloat16".
    shape: The extents.

Raises:
    InvalidArgumentError: For a dtype that no tensor of the format has, or memory that is not contiguous.)")
      .def(py::init<py::object, std::optional<std::string>,
                    std::optional<std::vector<std::int64_t>>>(),
           py::arg("buffer"), py::arg("dtype") = py::none(), py::arg("shape") = py::none())
      .def_property_readonly(
          "dtype",
          [](const PyHostTensor& self) { return std::string(to_string(self.tensor().dtype)); })
      .def_property_readonly("shape", &PyHostTensor::shape);

  py::class_<PyBuffer>(module, "HostBuffer",
                       "Zeroed host memory that other libraries take over by DLPack.")
      .def(py::init<std::vector<std::int64_t>, std::string>(), py::arg("shape"), py::arg("dtype"))
      .def(
          "__dlpack__",
          [](const PyBuffer& self, const py::object&, const py::object&, const py::object&,
             const py::object&) { return py::object(export_dlpack(self.array())); },
          py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
          py::arg("dl_device") = py::none(), py::arg("copy") = py::none())
      .def("__dlpack_device__", [](const PyBuffer&) {
        constexpr int kCpuDeviceType = 1;
        return std::pair<int, int>(kCpuDeviceType, 0);
      });
}

void bind_device_buffer(py::module_& module) {
  py::class_<PyDeviceBuffer>(
      module, "DeviceBuffer",
      R"(Zeroed memory on a context's device that other libraries take over by DLPack.

Work of the context's stream is waited for when it is taken over.)")
      .def(py::init<ContextHandle, std::vector<std::int64_t>, std::string>(), py::arg("context"),
           py::arg("shape"), py::arg("dtype"))
      .def_property_readonly("shape", &PyDeviceBuffer::shape)
      .def(
          "__dlpack__",
          [](const PyDeviceBuffer& self, const py::object& stream, const py::object&,
             const py::object&, const py::object&) { return self.export_for(stream); },
          py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
          py::arg("dl_device") = py::none(), py::arg("copy") = py::none())
      .def("__dlpack_device__", [](const PyDeviceBuffer& self) {
        constexpr int kCpuDeviceType = 1;
        constexpr int kCudaDeviceType = 2;
        const Device device = self.array().device;
        return std::pair<int, int>(
            device.kind == DeviceKind::kCpu ? kCpuDeviceType : kCudaDeviceType, device.index);
      });
}

}  // namespace marlinq::bindings
