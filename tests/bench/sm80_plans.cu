// Every plan of the sm80 kernels: plans.cuh says how they are timed.
#include "cuda/arch/sm80/launch.hpp"
#include "plans.cuh"

namespace {

using namespace marlinq::cuda;
using marlinq::bench::NamedPlan;

std::vector<NamedPlan> every_plan(const GemmProblem& problem, const DeviceLimits& limits) {
  std::vector<NamedPlan> plans;
  const auto all = sm80::instances(problem.x_type, problem.weight.code_bits);
  const int sms = limits.multiprocessors;
  for (std::int32_t i = 0; i < static_cast<std::int32_t>(all.size()); ++i) {
    const sm80::Instance& kernel = all[static_cast<std::size_t>(i)];
    char name[64];
    if (kernel.kind == KernelKind::kStrip) {
      if (problem.m > kernel.tokens || (problem.m <= 8 && kernel.tokens > 8)) continue;
      for (const int warps : {4, 8, 12, 16}) {
        if (warps > kernel.warps) continue;
        const GemmPlan plan = sm80::strip_plan(problem, i, sms, warps);
        if (plan.shared_bytes > limits.shared_bytes - 256) continue;
        std::snprintf(name, sizeof name, "strip%d w%d", kernel.tokens, warps);
        plans.push_back({name, plan});
      }
      continue;
    }
    if (problem.m <= kernel.tokens / 8 || (kernel.tokens == 32 && problem.m > 256)) continue;
    const int occupancy = kernel.blocks_together;
    const int blocks = occupancy * sms;
    const std::int64_t tiles =
        static_cast<std::int64_t>((problem.weight.n + kernel.features - 1) / kernel.features) *
        ((problem.m + kernel.tokens - 1) / kernel.tokens);
    const int left = static_cast<int>(tiles % blocks);
    std::vector<int> tails = {left};
    if (left > 0) {
      for (const int split : {2, 3, 4, 8})
        if (left * split < blocks) tails.push_back(left * split);
      tails.push_back(blocks);
    }
    for (const int tail : tails) {
      if (tail > 0 && left * problem.weight.chunks / tail < 2) continue;
      const GemmPlan plan = sm80::tile_plan(problem, i, blocks, tail);
      if (plan.shared_bytes > (limits.shared_bytes - 1024 * occupancy) / occupancy) continue;
      std::snprintf(name, sizeof name, "tile%dx%dk%dw%d t%d/%d", kernel.features, kernel.tokens,
                    kernel.row_warps, kernel.warps, tail, left);
      plans.push_back({name, plan});
    }
  }
  return plans;
}

}  // namespace

int main(int argc, char** argv) {
  return marlinq::bench::run_plans(argc, argv, {"sm80", every_plan});
}
