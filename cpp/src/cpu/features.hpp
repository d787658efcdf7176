// What the processor and the operating system offer, as a mask of Feature.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/isa_table.hpp"

namespace marlinq::cpu {

/// Read once per process.
std::uint32_t host_features() noexcept;

/// "avx2, fma, f16c".
std::string feature_names(std::uint32_t mask);

/// The processor's own name, or its architecture.
std::string host_name();

}  // namespace marlinq::cpu
