#include "cpu/context.hpp"

#include <algorithm>
#include <limits>

#include "core/matrix_checks.hpp"
#include "cpu/isa_table.hpp"
#include "cpu/parallel.hpp"

namespace marlinq::cpu {

float* ContextState::grow(std::size_t slot, std::int64_t elements) {
  CpuBuffer& buffer = scratch[slot];
  if (buffer.size() < elements) {
    buffer = CpuBuffer();  // free first: contents need not survive
    buffer = CpuBuffer(DType::kFloat32, elements);
    ++scratch_allocations;
  }
  return static_cast<float*>(buffer.data());
}

void ContextState::pregrow(std::int64_t elements) {
  // Padding inside groups adds less than the input again, and fused modules with permutations of
  // their own keep a copy each. Run inputs are one for at least 8 of these. What is not touched
  // costs only address space; the floor is for small K, where padding weighs most.
  constexpr std::int64_t kCopies = 4;
  constexpr std::int64_t kRunRows = 8;
  constexpr auto kRunInput = static_cast<std::int64_t>(sizeof(RunInput) / sizeof(float));
  constexpr std::int64_t kFloor = std::int64_t{1} << 16;
  if (elements == 0) return;
  const std::int64_t most =
      std::numeric_limits<std::int64_t>::max() / kCopies - kFloor - threads * kMostPreparedByParts;
  const std::int64_t copies =
      std::min(elements, most) * kCopies + threads * kMostPreparedByParts + kFloor;
  grow(Scratch::kInput, copies);
  grow(Scratch::kRunInputs, copies / kRunRows * kRunInput);
}

CpuContext::CpuContext(int threads) : state_(std::make_unique<ContextState>()) {
  if (threads < 0 || threads > max_threads()) {
    refuse_argument(concat("threads: ", threads, ", expected 0 (all) to ", max_threads()));
  }
  state_->threads = threads > 0 ? threads : default_threads();
}

CpuContext::CpuContext(CpuContext&&) noexcept = default;
CpuContext& CpuContext::operator=(CpuContext&&) noexcept = default;
CpuContext::~CpuContext() = default;

int CpuContext::threads() const noexcept { return state_->threads; }
std::int64_t CpuContext::scratch_allocations() const noexcept {
  return state_->scratch_allocations;
}

}  // namespace marlinq::cpu
