// Builds messages from values; std::format is not in every standard library that we build with.
#pragma once

#include <sstream>
#include <string>

namespace marlinq {

template <class... Values>
std::string concat(const Values&... values) {
  std::ostringstream out;
  (out << ... << values);
  return out.str();
}

}  // namespace marlinq
