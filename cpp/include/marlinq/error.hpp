// The one exception type of the library and its codes.
#pragma once

#include <source_location>
#include <stdexcept>
#include <string>
#include <string_view>

#include "marlinq/export.hpp"

namespace marlinq {

enum class ErrorCode {
  kInvalidArgument,  // a value that the caller passed
  kInvalidFile,      // what a checkpoint holds
  kUnsupported,      // understood, but this build, backend or kernel does not do it
  kOutOfMemory,
  kDevice,    // a device or its driver failed, or the device does not exist
  kInternal,  // a defect of marlinq
};

/// "invalid_argument", "invalid_file", ...
MARLINQ_API std::string_view to_string(ErrorCode code) noexcept;

/// Everything marlinq throws. The message names the tensor or argument, what came and what was
/// needed.
class MARLINQ_API Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message,
        std::source_location where = std::source_location::current());

  ErrorCode code() const noexcept { return code_; }
  /// Where in marlinq the error was raised.
  const std::source_location& where() const noexcept { return where_; }

 private:
  ErrorCode code_;
  std::source_location where_;
};

}  // namespace marlinq
