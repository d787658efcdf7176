#include "bindings/errors.hpp"

#include <pybind11/pybind11.h>

#include <new>

#include "marlinq/error.hpp"

namespace py = pybind11;

namespace marlinq::bindings {
namespace {

const char* class_name(ErrorCode code) noexcept {
  switch (code) {
    case ErrorCode::kInvalidArgument:
      return "InvalidArgumentError";
    case ErrorCode::kInvalidFile:
      return "InvalidFileError";
    case ErrorCode::kUnsupported:
      return "UnsupportedError";
    case ErrorCode::kOutOfMemory:
      return "OutOfMemoryError";
    case ErrorCode::kDevice:
      return "DeviceError";
    case ErrorCode::kInternal:
      break;
  }
  return "InternalError";
}

}  // namespace

void register_errors() {
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    if (!pointer) return;
    try {
      std::rethrow_exception(pointer);
    } catch (const std::bad_alloc&) {
      const py::object type = py::module_::import("marlinq.errors").attr("OutOfMemoryError");
      PyErr_SetString(type.ptr(), "out of host memory");
    } catch (const Error& error) {
      const py::object type = py::module_::import("marlinq.errors").attr(class_name(error.code()));
      PyErr_SetString(type.ptr(), error.what());
    }
  });
}

}  // namespace marlinq::bindings
