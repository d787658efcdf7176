// Every plan of the sm90 kernels, and what sm80 would take: plans.cuh says how they are timed.
#include "cuda/arch/sm90/launch.hpp"
#include "plans.cuh"

namespace {

using namespace marlinq::cuda;
using marlinq::bench::NamedPlan;

void add_strips(const GemmProblem& problem, const DeviceLimits& limits, std::int32_t index,
                std::vector<NamedPlan>& plans) {
  const sm90::Instance& kernel =
      sm90::instances(problem.x_type, problem.weight.code_bits)[static_cast<std::size_t>(index)];
  if (problem.m > kernel.tokens || problem.m <= kernel.tokens - 8) return;
  const int halves = (problem.weight.n + 63) / 64 * 2;
  for (const int together : {1, 2}) {
    for (const int cluster_blocks : {1, 2}) {
      const int most = together * limits.multiprocessors / cluster_blocks;
      if (together > kernel.blocks_together || 2 * halves < most) continue;
      const int busiest = (halves + most - 1) / most;
      for (const int clusters : {(halves + busiest - 1) / busiest, std::min(most, halves)}) {
        for (const int stages : {1, 2, 3, 4, 5}) {
          for (const int early : {1, stages}) {
            const sm90::StripChoice choice{
                .clusters = clusters,
                .cluster_blocks = cluster_blocks,
                .share_halves = busiest % 2 == 0 && clusters < most ? 2 : 1,
                .stages = stages,
                .early_stages = early};
            const GemmPlan plan = sm90::strip_plan(problem, index, choice);
            if (plan.shared_bytes > limits.multiprocessor_shared_bytes / together - 1536) continue;
            char name[64];
            std::snprintf(name, sizeof name, "strip%d%s w%d c%dx%d s%d e%d", kernel.tokens,
                          kernel.streams_x ? "x" : "", kernel.warps, clusters, cluster_blocks,
                          stages, early);
            plans.push_back({name, plan});
            if (stages == 1) break;
          }
        }
      }
    }
  }
}

std::vector<NamedPlan> every_plan(const GemmProblem& problem, const DeviceLimits& limits) {
  std::vector<NamedPlan> plans;
  plans.push_back({"sm80", sm80::plan(problem, limits, marlinq::BatchInvariance::kNotRequired)});
  const auto all = sm90::instances(problem.x_type, problem.weight.code_bits);
  for (std::int32_t i = 0; i < static_cast<std::int32_t>(all.size()); ++i) {
    const sm90::Instance& kernel = all[static_cast<std::size_t>(i)];
    if (kernel.kind == KernelKind::kStrip) {
      add_strips(problem, limits, i, plans);
      continue;
    }
    const int padded = (problem.m + kernel.tokens - 1) / kernel.tokens * kernel.tokens;
    if (padded >= problem.m + 64 || (kernel.tokens > 32 && 2 * padded > 3 * problem.m)) continue;
    if (problem.m > (kernel.tokens < 96 ? 4 : 64) * kernel.tokens) continue;
    const int sms = limits.multiprocessors / kernel.cluster_blocks;
    const int left = sm90::tile_plan(problem, i, limits, 1).schedule.tail_tiles;
    std::vector<int> tails = {left};
    if (left > 0) {
      for (const int split : {2, 3, 4, 8})
        if (left * split < sms) tails.push_back(left * split);
      tails.push_back(sms);
    }
    for (const int tail : tails) {
      if (tail > 0 && left * problem.weight.chunks / tail < 4) continue;
      const GemmPlan plan = sm90::tile_plan(problem, i, limits, tail);
      if (plan.shared_bytes > limits.shared_bytes - 512) continue;
      char name[64];
      std::snprintf(name, sizeof name, "tile%dx%d%s t%d/%d", kernel.blocks * 64, kernel.tokens,
                    kernel.cluster_blocks == 2 ? " pairs" : "", tail, left);
      plans.push_back({name, plan});
    }
    for (const int parts : {2, 4, 6, 8}) {
      if (problem.weight.chunks < 4 * parts) continue;
      const GemmPlan plan = sm90::tile_pairs_plan(problem, i, limits, parts);
      if (plan.shared_bytes > limits.shared_bytes - 512) continue;
      char name[64];
      std::snprintf(name, sizeof name, "tile%dx%d in pairs t%d/%d", kernel.blocks * 64,
                    kernel.tokens, plan.schedule.tail_blocks, left);
      plans.push_back({name, plan});
    }
  }
  return plans;
}

}  // namespace

int main(int argc, char** argv) {
  return marlinq::bench::run_plans(argc, argv, {"sm90", every_plan});
}
