// Builds messages from values. Not over streams: those carry the locale machinery of the C++ library into
// processes where more than one copy of it may be loaded.
#pragma once

#include <array>
#include <charconv>
#include <concepts>
#include <string>
#include <string_view>

namespace marlinq {
namespace detail {

inline void append(std::string& text, std::string_view value) { text += value; }
inline void append(std::string& text, char value) { text += value; }

template <class Number>
  requires(std::integral<Number> || std::floating_point<Number>)
void append(std::string& text, Number value) {
  constexpr int kDigits = 6;  // of a fraction, as printf's %g
  std::array<char, 32> digits;
  std::to_chars_result end;
  if constexpr (std::floating_point<Number>) {
    end = std::to_chars(digits.data(), digits.data() + digits.size(), value,
                        std::chars_format::general, kDigits);
  } else {
    end = std::to_chars(digits.data(), digits.data() + digits.size(), value);
  }
  text.append(digits.data(), end.ptr);
}

}  // namespace detail

template <class... Values>
std::string concat(const Values&... values) {
  std::string text;
  (detail::append(text, values), ...);
  return text;
}

}  // namespace marlinq
