// Looks for the quickest schedule of a layer: each is timed with codes that come from memory.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "core/marlin_linear.hpp"
#include "cuda/context.hpp"
#include "cuda/cuda_check.hpp"
#include "cuda/handles.hpp"
#include "cuda/packed.hpp"
#include "cuda/replay.hpp"
#include "cuda/schedule_table.hpp"

namespace marlinq {
namespace cuda {
namespace {

constexpr std::int64_t kMostRows = 1 << 16;

void check_rows_to_tune(std::span<const std::int64_t> rows) {
  std::int64_t before = 0;
  for (const std::int64_t m : rows) {
    if (m <= before || m > kMostRows) {
      refuse_argument(concat("rows: ", m, " after ", before,
                             ", expected ascending numbers from 1 to ", kMostRows));
    }
    before = m;
  }
}

/// Modules of an expert, of those after it, and of as many copies of all of them as leave no room in the cache for the
/// first when its turn comes again.
class ColdCopies {
 public:
  ColdCopies(const DeviceWeight& weight, const Segment& segment, std::int64_t expert, int device,
             cudaStream_t stream) {
    int cache = 0;
    MARLINQ_CUDA_CHECK(cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device));
    constexpr std::int64_t kTimesCache = 3;
    const std::int64_t wanted = kTimesCache * cache;
    for (std::int64_t i = 0; i < weight.experts && i * weight.expert_bytes < wanted; ++i)
      views_.push_back(expert_view(weight, segment, (expert + i) % weight.experts));
    const std::size_t originals = views_.size();
    const std::int64_t bytes = weight.memory.size() * 4;
    const auto* const first = static_cast<const unsigned char*>(weight.memory.data());
    for (std::int64_t total = bytes; total < wanted; total += bytes) {
      memories_.emplace_back(device, weight.memory.dtype(), weight.memory.size());
      auto* const copy = static_cast<unsigned char*>(memories_.back().data());
      MARLINQ_CUDA_CHECK(cudaMemcpyAsync(copy, first, static_cast<std::size_t>(bytes),
                                         cudaMemcpyDeviceToDevice, stream));
      const auto away = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(copy) -
                                                  reinterpret_cast<std::uintptr_t>(first));
      for (std::size_t i = 0; i < originals; ++i) views_.push_back(moved(views_[i], away));
    }
  }

  const WeightView& next() {
    position_ = (position_ + 1) % views_.size();
    return views_[position_];
  }

 private:
  std::vector<CudaBuffer> memories_;
  std::vector<WeightView> views_;
  std::size_t position_ = 0;
};

/// Values like those of activations: what a kernel draws depends on them, and so does the clock.
void fill_with_values(void* data, std::int64_t elements, FloatType type, cudaStream_t stream) {
  std::vector<std::uint16_t> values(
      static_cast<std::size_t>(std::min<std::int64_t>(elements, std::int64_t{1} << 20)));
  std::uint64_t state = 1;
  for (std::uint16_t& value : values) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    const auto random = static_cast<std::uint32_t>(state >> 33);
    // A sign, a mantissa, and one of the four exponents up to that of 1.
    value = type == FloatType::kF16
                ? static_cast<std::uint16_t>((random & 0x83ff) | ((12 + (random >> 16 & 3)) << 10))
                : static_cast<std::uint16_t>((random & 0x807f) | ((124 + (random >> 16 & 3)) << 7));
  }
  const auto count = static_cast<std::int64_t>(values.size());
  for (std::int64_t begin = 0; begin < elements; begin += count) {
    MARLINQ_CUDA_CHECK(
        cudaMemcpyAsync(static_cast<std::uint16_t*>(data) + begin, values.data(),
                        static_cast<std::size_t>(std::min(count, elements - begin)) * 2,
                        cudaMemcpyHostToDevice, stream));
  }
  MARLINQ_CUDA_CHECK(cudaStreamSynchronize(stream));
}

/// Schedules of modules with one row order.
class SegmentTuner {
 public:
  SegmentTuner(const ContextState& state, const PackedExperts& packed, const Segment& segment,
               std::int64_t expert, FloatType type, std::int64_t most_rows)
      : state_(state),
        arch_(packed.arch()),
        entry_(
            entry_of(state.device, packed.arch(), segment.view, packed.description().group_size)),
        copies_(packed.weight(), segment, expert, state.device, stream_.get()) {
    const WeightView& view = segment.view;
    const std::int32_t columns = view.chunks * 64;
    x_ = CudaBuffer(state.device, DType::kFloat16, most_rows * columns);
    y_ = CudaBuffer(state.device, DType::kFloat16, most_rows * view.n);
    fill_with_values(x_.data(), x_.size(), type, stream_.get());
    problem_ = problem_without_data(view, 0);
    problem_.x = x_.data();
    problem_.x_type = problem_.y_type = type;
    problem_.x_stride = problem_.x_columns = columns;
    problem_.y = y_.data();
  }

  TunedSchedule tune(std::int64_t rows_before, std::int64_t rows) {
    problem_.m = static_cast<std::int32_t>(rows);
    const GemmPlan estimated = arch_.plan(problem_, state_.limits, BatchInvariance::kNotRequired);
    std::string words;  // of the estimate's choice, where that has some
    std::vector<Candidate> candidates;
    for (const Schedule& schedule : arch_.schedules(problem_, state_.limits)) {
      const GemmPlan plan = arch_.plan_as(problem_, state_.limits, schedule);
      if (plan == estimated) {
        words = to_string(schedule);
      } else {
        candidates.push_back({schedule, plan, time_of(plan)});
      }
    }
    // Few are timed well: one after the other in turns, so that a change of the clock is a change for all.
    constexpr std::size_t kFinalists = 6;
    const std::size_t finalists = std::min(candidates.size(), kFinalists);
    std::partial_sort(candidates.begin(),
                      candidates.begin() + static_cast<std::ptrdiff_t>(finalists), candidates.end(),
                      [](const Candidate& a, const Candidate& b) { return a.us < b.us; });
    std::vector<Replay> replays;
    replays.push_back(replay_of(estimated));
    for (std::size_t i = 0; i < finalists; ++i) replays.push_back(replay_of(candidates[i].plan));
    const std::vector<double> times = times_in_turns(replays);
    const auto best =
        static_cast<std::size_t>(std::min_element(times.begin(), times.end()) - times.begin());
    TunedSchedule result{.entry = entry_, .us = times[best], .estimated_us = times[0]};
    result.entry.first_rows = rows_before + 1;
    result.entry.last_rows = rows;
    result.entry.schedule = best == 0 ? words : to_string(candidates[best - 1].schedule);
    return result;
  }

 private:
  struct Candidate {
    Schedule schedule;
    GemmPlan plan;
    double us;
  };

  Replay replay_of(const GemmPlan& plan) {
    // Long enough for the host's part in a replay to be small.
    constexpr double kReplaySeconds = 8e-4;
    constexpr double kLeast = 4e-6;
    constexpr double kOperations = 4e14;
    const double guess =
        std::max(kLeast, 2.0 * problem_.m * problem_.weight.n * problem_.weight.k / kOperations);
    const int launches = std::clamp(static_cast<int>(kReplaySeconds / guess), 2, 200);
    return Replay(stream_.get(), launches, [&](int) {
      problem_.weight = copies_.next();
      arch_.launch(problem_, plan, state_.split_scratch(), stream_.get());
    });
  }

  double time_of(const GemmPlan& plan) {
    Replay replay = replay_of(plan);
    (void)replay.us();
    return std::min(replay.us(), replay.us());
  }

  static std::vector<double> times_in_turns(std::vector<Replay>& replays) {
    constexpr std::size_t kTurns = 11;
    std::vector<std::array<double, kTurns>> all(replays.size());
    for (std::size_t turn = 0; turn < kTurns; ++turn)
      for (std::size_t i = 0; i < replays.size(); ++i) all[i][turn] = replays[i].us();
    std::vector<double> medians;
    for (auto& times : all) {
      std::sort(times.begin(), times.end());
      medians.push_back(times[kTurns / 2]);
    }
    return medians;
  }

  const ContextState& state_;
  const ArchKernels& arch_;
  ScheduleEntry entry_;
  OwnedStream stream_;
  ColdCopies copies_;
  CudaBuffer x_, y_;
  GemmProblem problem_;
};

}  // namespace
}  // namespace cuda

std::vector<TunedSchedule> CudaBackend::tune(Context& context, const Linear<CudaBackend>& linear,
                                             std::span<const std::int64_t> rows, DType dtype) {
  const auto& layer = static_cast<const MarlinLinear<CudaBackend>&>(linear);
  check_context(context.device(), layer.packed().device());
  cuda::check_rows_to_tune(rows);
  if (dtype != DType::kFloat16 && dtype != DType::kBFloat16) {
    refuse_argument(concat("dtype: ", to_string(dtype), ", expected float16 or bfloat16"));
  }
  if (rows.empty()) return {};
  // The context's scratch is what the kernels share.
  synchronise(context);
  const cuda::ContextState& state = context.state();
  const cuda::DeviceGuard guard(state.device);
  layer.packed().weight().ready.wait();
  std::vector<TunedSchedule> tuned;
  for (const cuda::Segment& segment : layer.packed().weight().segments) {
    cuda::SegmentTuner tuner(
        state, layer.packed(), segment, layer.expert(),
        dtype == DType::kFloat16 ? cuda::FloatType::kF16 : cuda::FloatType::kBF16, rows.back());
    std::int64_t before = 0;
    for (const std::int64_t m : rows) {
      tuned.push_back(tuner.tune(before, m));
      before = m;
    }
  }
  return tuned;
}

}  // namespace marlinq
