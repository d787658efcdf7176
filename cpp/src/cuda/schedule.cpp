#include "cuda/schedule.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <span>

#include "core/concat.hpp"
#include "core/refuse.hpp"

namespace marlinq::cuda {
namespace {

/// A word of a schedule's text, and the field that it tells.
struct Word {
  std::string_view name;
  std::int32_t Schedule::* field;
};
constexpr std::array<Word, 5> kTileWords{{{"features", &Schedule::features},
                                          {"tokens", &Schedule::tokens},
                                          {"warps", &Schedule::warps},
                                          {"cluster", &Schedule::cluster_blocks},
                                          {"share", &Schedule::share}}};
constexpr std::array<Word, 7> kStripWords{{{"tokens", &Schedule::tokens},
                                           {"warps", &Schedule::warps},
                                           {"cluster", &Schedule::cluster_blocks},
                                           {"clusters", &Schedule::clusters},
                                           {"halves", &Schedule::share_halves},
                                           {"stages", &Schedule::stages},
                                           {"early", &Schedule::early_stages}}};
constexpr std::string_view kTiles = "tiles";
constexpr std::string_view kStrips = "strips";
constexpr std::string_view kPairs = "pairs";
constexpr std::string_view kStreamed = "streamed";

std::span<const Word> words_of(KernelKind kind) {
  if (kind == KernelKind::kTile) return kTileWords;
  return kStripWords;
}

[[noreturn]] void refuse(std::string_view text) {
  refuse_argument(concat("schedules: '", text, "' is no schedule, expected one that a tuner told"));
}

}  // namespace

std::string to_string(const Schedule& schedule) {
  const bool tiles = schedule.kind == KernelKind::kTile;
  std::string text = concat(schedule.kernels, " ", tiles ? kTiles : kStrips);
  for (const Word& word : words_of(schedule.kind))
    text += concat(" ", word.name, "=", schedule.*word.field);
  if (schedule.in_pairs) text += concat(" ", kPairs);
  if (schedule.streams_x) text += concat(" ", kStreamed);
  return text;
}

Schedule parse_schedule(std::string_view text) {
  const std::string_view whole = text;
  const auto next = [&text] {
    const std::string_view word = text.substr(0, text.find(' '));
    text.remove_prefix(std::min(word.size() + 1, text.size()));
    return word;
  };
  Schedule schedule;
  schedule.kernels = next();
  const std::string_view kind = next();
  if (kind != kTiles && kind != kStrips) refuse(whole);
  schedule.kind = kind == kTiles ? KernelKind::kTile : KernelKind::kStrip;
  while (!text.empty()) {
    const std::string_view word = next();
    if (word == kPairs || word == kStreamed) {
      (word == kPairs ? schedule.in_pairs : schedule.streams_x) = true;
      continue;
    }
    const std::size_t equals = std::min(word.find('='), word.size());
    const Word* found = nullptr;
    for (const Word& known : words_of(schedule.kind))
      if (known.name == word.substr(0, equals)) found = &known;
    if (found == nullptr || equals == word.size()) refuse(whole);
    const char* const end = word.data() + word.size();
    const auto read = std::from_chars(word.data() + equals + 1, end, schedule.*found->field);
    if (read.ec != std::errc() || read.ptr != end) refuse(whole);
  }
  return schedule;
}

}  // namespace marlinq::cuda
