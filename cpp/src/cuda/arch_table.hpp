// What a GPU architecture folder offers to the backend: plain data and function pointers.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "cuda/device_weight.hpp"
#include "cuda/problem.hpp"
#include "cuda/schedule.hpp"

namespace marlinq::cuda {

class LayersToLoad;
class LayerUpload;

struct ArchKernels {
  const char* name;
  int priority;        // the usable entry with the highest is chosen
  int min_capability;  // 10 * major + minor
  int max_capability;
  const char* requirement;  // for people

  /// Packs a layer, or the experts of a stack, from the pieces of their upload; returns when the
  /// tensors of the caller are no longer needed and everything has been checked. Throws what the layers
  /// do, out_of_memory or device.
  DeviceWeight (*pack)(LayersToLoad& experts, LayerUpload& upload);

  /// Pure: how to run a problem.
  GemmPlan (*plan)(const GemmProblem& problem, const DeviceLimits& limits,
                   BatchInvariance invariance);

  /// Pure: every schedule that may be the quickest for a problem, each of which has a plan that fits.
  std::vector<Schedule> (*schedules)(const GemmProblem& problem, const DeviceLimits& limits);

  /// Pure: the plan of such a schedule. One that these kernels do not have, or that does not fit, has a plan of
  /// INT32_MAX shared_bytes.
  GemmPlan (*plan_as)(const GemmProblem& problem, const DeviceLimits& limits,
                      const Schedule& schedule);

  /// Measured schedules that come with the library, as text.
  std::string_view measured;

  /// Most floats of partial sums and most flags that any plan needs.
  void (*scratch_need)(const DeviceLimits& limits, std::int64_t& partial_floats,
                       std::int32_t& flags);

  void (*launch)(const GemmProblem& problem, const GemmPlan& plan, const SplitScratch& scratch,
                 void* stream);

  /// The same for products over experts. `most_dispatches` are what one launch takes of
  /// ExpertProblem::dispatches.
  ExpertPlan (*plan_experts)(const ExpertProblem& problem, const DeviceLimits& limits,
                             BatchInvariance invariance);
  void (*launch_experts)(const ExpertProblem& problem, const ExpertPlan& plan,
                         const DeviceLimits& limits, const SplitScratch& scratch, void* stream);
  int most_dispatches;
  /// The rows of the tiles that tokens are best sorted into, 8 to 128: `ids` of so many tokens, shared among
  /// so many experts.
  std::int32_t (*tile_rows)(std::int64_t tokens, std::int64_t ids, std::int64_t experts,
                            BatchInvariance invariance);
  /// For a problem with lists of tiles: the most ids that its kernel could have sorted by itself instead,
  /// TokenTileLists::topk; 0: none.
  std::int32_t (*most_sorted_ids)(const ExpertProblem& problem, const DeviceLimits& limits,
                                  BatchInvariance invariance);

  bool runs_on(int capability) const noexcept {
    return min_capability <= capability && capability <= max_capability;
  }
};

/// Every architecture of this build, best first.
std::span<const ArchKernels* const> arch_kernels();

/// `name` empty: the best for the capability. Throws invalid_argument or unsupported.
const ArchKernels& choose_arch(std::string_view name, int capability);

}  // namespace marlinq::cuda
