#include "cpu/features.hpp"

#include <array>
#include <cstring>
#include <utility>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define MARLINQ_X86 1
#endif

namespace marlinq::cpu {
namespace {

constexpr std::array<std::pair<Feature, const char*>, 7> kNames = {{
    {kAvx2, "avx2"},
    {kFma, "fma"},
    {kF16c, "f16c"},
    {kAvx512, "avx512"},
    {kAvx512Vnni, "avx512_vnni"},
    {kAvx512Bf16, "avx512_bf16"},
    {kAvxVnni, "avx_vnni"},
}};

#if defined(MARLINQ_X86)

struct Registers {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf = 0) noexcept {
  Registers r;
  if (__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx) == 0) return {};
  return r;
}

// Which register files the operating system saves (XCR0).
std::uint64_t saved_state() noexcept {
  std::uint32_t low = 0;
  std::uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

std::uint32_t detect() noexcept {
  const auto bit = [](std::uint32_t word, int index) { return (word >> index & 1U) != 0; };
  const Registers basic = cpuid(1);
  if (!bit(basic.ecx, 27) || !bit(basic.ecx, 28)) return 0;  // OSXSAVE, AVX
  constexpr std::uint64_t kYmm = 0x6;
  constexpr std::uint64_t kZmm = 0xE6;
  const std::uint64_t saved = saved_state();
  if ((saved & kYmm) != kYmm) return 0;
  const Registers extended = cpuid(7);
  std::uint32_t mask = 0;
  if (bit(extended.ebx, 5)) mask |= kAvx2;
  if (bit(basic.ecx, 12)) mask |= kFma;
  if (bit(basic.ecx, 29)) mask |= kF16c;
  if (bit(cpuid(7, 1).eax, 4)) mask |= kAvxVnni;
  if ((saved & kZmm) != kZmm) return mask;
  const bool f = bit(extended.ebx, 16);
  const bool dq = bit(extended.ebx, 17);
  const bool bw = bit(extended.ebx, 30);
  const bool vl = bit(extended.ebx, 31);
  if (!(f && dq && bw && vl)) return mask;
  mask |= kAvx512;
  if (bit(extended.ecx, 11)) mask |= kAvx512Vnni;
  if (bit(cpuid(7, 1).eax, 5)) mask |= kAvx512Bf16;
  return mask;
}

#else

std::uint32_t detect() noexcept { return 0; }

#endif

}  // namespace

std::uint32_t host_features() noexcept {
  static const std::uint32_t mask = detect();
  return mask;
}

std::string feature_names(std::uint32_t mask) {
  std::string text;
  for (const auto& [feature, name] : kNames) {
    if ((mask & feature) != 0) text += (text.empty() ? "" : ", ") + std::string(name);
  }
  return text;
}

std::string host_name() {
#if defined(MARLINQ_X86)
  constexpr std::uint32_t kBrand = 0x80000002U;
  std::array<char, 49> brand = {};
  for (std::uint32_t i = 0; i < 3; ++i) {
    const Registers r = cpuid(kBrand + i);
    std::memcpy(brand.data() + 16 * i, &r, 16);
  }
  std::string name(brand.data());
  const std::size_t first = name.find_first_not_of(' ');
  const std::size_t last = name.find_last_not_of(' ');
  return first == std::string::npos ? "x86-64" : name.substr(first, last - first + 1);
#elif defined(__aarch64__)
  return "aarch64";
#else
  return "unknown processor";
#endif
}

}  // namespace marlinq::cpu
