// The way to say that an argument is wrong.
#pragma once

#include <source_location>
#include <string>

#include "core/concat.hpp"
#include "marlinq/error.hpp"

namespace marlinq {

/// Throws invalid_argument, raised where this is called.
[[noreturn]] inline void refuse_argument(
    const std::string& message, std::source_location where = std::source_location::current()) {
  throw Error(ErrorCode::kInvalidArgument, message, where);
}

}  // namespace marlinq
