// Chooses the instruction set: once per process, or by the name that LoadOptions::kernel gives.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "cpu/isa_table.hpp"
#include "marlinq/load_options.hpp"

namespace marlinq::cpu {

/// Every instruction set of this build, best first.
std::span<const IsaKernels* const> isa_kernels();

/// `name` empty: the best that this machine runs. Throws invalid_argument for an unknown name and
/// unsupported for one that this machine cannot run.
const IsaKernels& choose_isa(std::string_view name);

/// The same for a machine with the features of `mask`.
const IsaKernels& choose_isa(std::string_view name, std::uint32_t mask);

/// The compute type that `requested` stands for: int16 for kAuto where the instruction set has an
/// instruction for it (VNNI), else float32.
Compute choose_compute(Compute requested, const IsaKernels& isa) noexcept;

/// `compute` (not kAuto) on one instruction set.
const Arithmetic& arithmetic_of(const IsaKernels& isa, Compute compute) noexcept;

}  // namespace marlinq::cpu
