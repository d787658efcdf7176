#include "bindings/dlpack.hpp"

#include <utility>

#include "core/concat.hpp"
#include "core/refuse.hpp"
#include "marlinq/error.hpp"

namespace py = pybind11;

namespace marlinq::bindings {
namespace {

struct DLDevice {
  std::int32_t device_type;
  std::int32_t device_id;
};

struct DLDataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};

constexpr const char* kFresh = "dltensor";
constexpr const char* kUsed = "used_dltensor";

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };
enum TypeCode : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

DType dtype_of(DLDataType type, std::string_view name) {
  if (type.lanes == 1) {
    if (type.code == kFloat && type.bits == 32) return DType::kFloat32;
    if (type.code == kFloat && type.bits == 16) return DType::kFloat16;
    if (type.code == kBfloat && type.bits == 16) return DType::kBFloat16;
    // The words of a checkpoint are the bits of unsigned numbers, and some libraries say so.
    if ((type.code == kInt || type.code == kUInt) && type.bits == 32) return DType::kInt32;
    if (type.code == kInt && type.bits == 64) return DType::kInt64;
  }
  const char* family = type.code == kFloat    ? "float"
                       : type.code == kInt    ? "int"
                       : type.code == kUInt   ? "uint"
                       : type.code == kBfloat ? "bfloat"
                       : type.code == kBool   ? "bool"
                                              : "unknown dtype ";
  refuse_argument(concat(name, ": dtype ", family, static_cast<int>(type.bits),
                         type.lanes > 1 ? " in vectors" : "",
                         ", expected float32, float16, bfloat16, int32 or int64"));
}

DLDataType type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return {kFloat, 32, 1};
    case DType::kFloat16:
      return {kFloat, 16, 1};
    case DType::kBFloat16:
      return {kBfloat, 16, 1};
    case DType::kInt32:
      return {kInt, 32, 1};
    case DType::kInt64:
      return {kInt, 64, 1};
  }
  throw Error(ErrorCode::kInternal, "dtype without a DLPack type");
}

Device device_of(DLDevice device, std::string_view name) {
  if (device.device_type == kCpu || device.device_type == kCudaHost) return {};
  if (device.device_type == kCuda) return {DeviceKind::kCuda, device.device_id};
  refuse_argument(
      concat(name, ": DLPack device type ", device.device_type, ", expected a CPU or CUDA array"));
}

enum class Library { kTorch, kCupy, kOther };

/// The library of an object's class, or of a class that it derives from.
Library library_of(py::handle object) {
  for (const py::handle base : py::type::of(object).attr("__mro__")) {
    const auto module = py::cast<std::string>(base.attr("__module__"));
    const std::string_view root = std::string_view(module).substr(0, module.find('.'));
    if (root == "torch") return Library::kTorch;
    if (root == "cupy") return Library::kCupy;
  }
  return Library::kOther;
}

py::object take_capsule(py::handle object, std::string_view name, std::int64_t stream) {
  if (!py::hasattr(object, "__dlpack__")) {
    refuse_argument(concat(name, ": ", std::string(py::str(py::type::of(object).attr("__name__"))),
                           ", expected a numpy array or an object with __dlpack__"));
  }
  try {
    // Arrays of torch and CuPy are used on the stream that is current for their library, so nothing
    // has to wait. Any other producer makes our stream wait for its work.
    const Library library = library_of(object);
    // torch's __dlpack__ refuses tensors that are not on the current device; this does not.
    if (library == Library::kTorch) {
      return py::module_::import("torch.utils.dlpack").attr("to_dlpack")(object);
    }
    const auto device = py::cast<std::pair<int, int>>(object.attr("__dlpack_device__")());
    if (device.first == kCpu || device.first == kCudaHost) return object.attr("__dlpack__")();
    constexpr std::int64_t kNoWait = -1;
    return object.attr("__dlpack__")(py::arg("stream") =
                                         library == Library::kCupy ? kNoWait : stream);
  } catch (py::error_already_set& error) {
    if (error.matches(PyExc_MemoryError) || !error.matches(PyExc_Exception)) throw;
    // torch refuses tensors that require grad, among others; its own words say why.
    refuse_argument(concat(name, ": ", std::string(py::str(error.value()))));
  }
}

}  // namespace

BorrowedArray import_dlpack(py::handle object, std::string_view name, std::int64_t stream) {
  if (py::hasattr(object, "requires_grad") &&
      py::cast<bool>(py::bool_(object.attr("requires_grad")))) {
    refuse_argument(concat(name, ": the tensor requires grad, expected one without (detach() it)"));
  }
  py::object capsule = take_capsule(object, name, stream);
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), kFresh));
  if (managed == nullptr) {
    PyErr_Clear();
    refuse_argument(concat(name, ": __dlpack__() did not return a fresh dltensor capsule"));
  }
  PyCapsule_SetName(capsule.ptr(), kUsed);
  std::shared_ptr<void> owner(managed, [](void* pointer) {
    auto* tensor = static_cast<DLManagedTensor*>(pointer);
    if (tensor->deleter == nullptr) return;
    const py::gil_scoped_acquire gil;  // a producer's deleter may touch Python objects
    tensor->deleter(tensor);
  });
  const DLTensor& tensor = managed->dl_tensor;
  BorrowedArray array;
  array.dtype = dtype_of(tensor.dtype, name);
  array.device = device_of(tensor.device, name);
  array.data = static_cast<std::uint8_t*>(tensor.data) + tensor.byte_offset;
  array.shape.assign(tensor.shape, tensor.shape + tensor.ndim);
  array.strides.resize(array.shape.size());
  std::int64_t step = 1;
  for (std::size_t axis = array.shape.size(); axis-- > 0;) {
    array.strides[axis] = tensor.strides != nullptr ? tensor.strides[axis] : step;
    step *= array.shape[axis];
  }
  array.owner = std::move(owner);
  return array;
}

py::capsule export_dlpack(const BorrowedArray& array) {
  struct Exported {
    BorrowedArray array;
    DLManagedTensor managed;
  };
  auto exported = std::make_unique<Exported>(Exported{array, {}});
  DLManagedTensor& managed = exported->managed;
  managed.dl_tensor = {
      .data = array.data,
      .device = {.device_type = array.device.kind == DeviceKind::kCpu ? kCpu : kCuda,
                 .device_id = array.device.index},
      .ndim = static_cast<std::int32_t>(array.shape.size()),
      .dtype = type_of(array.dtype),
      .shape = exported->array.shape.data(),
      .strides = exported->array.strides.data(),
      .byte_offset = 0};
  managed.manager_ctx = exported.get();
  managed.deleter = [](DLManagedTensor* tensor) {
    delete static_cast<Exported*>(tensor->manager_ctx);
  };
  py::capsule capsule(&exported->managed, kFresh, [](PyObject* object) {
    // A consumer that took the tensor renamed the capsule and calls the deleter itself.
    if (PyCapsule_IsValid(object, kFresh) == 0) return;
    auto* tensor = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(object, kFresh));
    tensor->deleter(tensor);
  });
  exported.release();
  return capsule;
}

}  // namespace marlinq::bindings
