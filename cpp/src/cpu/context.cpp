#include "cpu/context.hpp"

#include "core/matrix_checks.hpp"
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

CpuContext::CpuContext(int threads) : state_(std::make_unique<ContextState>()) {
  constexpr int kMaxThreads = 4096;
  if (threads < 0 || threads > kMaxThreads) {
    refuse_argument(concat("threads: ", threads, ", expected 0 (all) to ", kMaxThreads));
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
