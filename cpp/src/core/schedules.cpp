#include "marlinq/schedules.hpp"

#include <array>
#include <charconv>
#include <cstdint>

#include "core/refuse.hpp"

namespace marlinq {
namespace {

constexpr std::string_view kBlank = " \t\r";

std::string_view trimmed(std::string_view text) {
  const std::size_t begin = text.find_first_not_of(kBlank);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kBlank) - begin + 1);
}

/// What is before the first `separator`, which is taken off the text with it; all of it where there is none.
std::string_view take(std::string_view& text, char separator) {
  const std::size_t end = text.find(separator);
  const std::string_view head = text.substr(0, end);
  text = end == std::string_view::npos ? std::string_view() : text.substr(end + 1);
  return head;
}

/// Two integers of `text`: `begin` first `between` second.
template <class A, class B>
bool read_pair(std::string_view text, std::string_view begin, A& first, std::string_view between,
               B& second) {
  if (!text.starts_with(begin)) return false;
  const char* const end = text.data() + text.size();
  const auto one = std::from_chars(text.data() + begin.size(), end, first);
  if (one.ec != std::errc()) return false;
  const std::string_view rest(one.ptr, static_cast<std::size_t>(end - one.ptr));
  if (!rest.starts_with(between)) return false;
  const auto two = std::from_chars(one.ptr + between.size(), end, second);
  return two.ec == std::errc() && two.ptr == end;
}

[[noreturn]] void refuse_line(int line, std::string_view what, std::string_view found,
                              std::string_view expected) {
  refuse_argument(concat("schedules: line ", line, ": ", what, found.empty() ? "" : " '", found,
                         found.empty() ? "" : "'", ", expected ", expected));
}

ScheduleEntry parse_entry(std::string_view text, int line) {
  std::array<std::string_view, 6> fields;
  std::size_t count = 0;
  for (bool more = true; more; ++count) {
    more = text.find('|') != std::string_view::npos;
    const std::string_view field = trimmed(take(text, '|'));
    if (count < fields.size()) fields[count] = field;
  }
  if (count != fields.size()) {
    refuse_line(line, concat(count, " fields"), "",
                "6: device | kernel | w4 g128 | NxK | first-last | schedule");
  }
  const auto [device, kernel, format, shape, rows, schedule] = fields;
  ScheduleEntry entry{.device = std::string(device),
                      .kernel = std::string(kernel),
                      .schedule = std::string(schedule)};
  if (!read_pair(format, "w", entry.bits, " g", entry.group_size))
    refuse_line(line, "format", format, "bits and group size such as w4 g128");
  if (!read_pair(shape, "", entry.n, "x", entry.k) || entry.n < 1 || entry.k < 1)
    refuse_line(line, "shape", shape, "NxK such as 4096x14336");
  if (!read_pair(rows, "", entry.first_rows, "-", entry.last_rows) || entry.first_rows < 1 ||
      entry.first_rows > entry.last_rows)
    refuse_line(line, "rows", rows, "the first and the last such as 17-32");
  if (schedule.empty()) refuse_line(line, "no schedule", "", "one");
  return entry;
}

}  // namespace

Schedules parse_schedules(std::string_view text) {
  Schedules schedules;
  for (int line = 1; !text.empty(); ++line) {
    const std::string_view entry = trimmed(take(text, '\n'));
    if (!entry.empty() && entry.front() != '#') schedules.push_back(parse_entry(entry, line));
  }
  return schedules;
}

std::string to_text(std::span<const ScheduleEntry> schedules) {
  std::string text;
  for (const ScheduleEntry& entry : schedules) {
    text += concat(entry.device, " | ", entry.kernel, " | w", entry.bits, " g", entry.group_size,
                   " | ", entry.n, "x", entry.k, " | ", entry.first_rows, "-", entry.last_rows,
                   " | ", entry.schedule, "\n");
  }
  return text;
}

}  // namespace marlinq
