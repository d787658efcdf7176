// How the kernels over experts fill their rings: where the weights lie, and the first stages.
#pragma once

#include <cstdint>

#include "cuda/arch/sm80/expert_tiles.cuh"
#include "cuda/arch/sm80/layout.hpp"
#include "cuda/arch/sm80/tile_loop.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/launch.cuh"

namespace marlinq::cuda::sm80 {

/// Where the strips of a warp lie in an expert's codes: two of the lower or of all features, and two more.
struct WarpStrips {
  int lower;  // the first of each two
  int upper;

  /// With an activation, the same two of both halves; past the last there is nothing to store, and the
  /// last are read again.
  __device__ __forceinline__ WarpStrips(int block, int features, bool activates) {
    constexpr int kStrips = Layout::kBlockStrips;
    const int strips = (features + Layout::kBlockFeatures - 1) / Layout::kBlockFeatures * kStrips;
    const int half = features / (2 * Layout::kStripFeatures);
    lower = activates ? min(block * 2, half - 2) : min(block * kStrips, strips - kStrips);
    upper = activates ? lower + half : lower + 2;
  }
};

/// In pieces of 16 bytes, from the codes of the weight.
template <class S>
__device__ __forceinline__ int strip_codes(int strip, int chunks, int chunk) {
  constexpr int kStrips = Layout::kBlockStrips;
  return ((strip / kStrips * chunks + chunk) * kStrips + strip % kStrips) * (S::kStripBytes / 16);
}
/// The same, from its first group record.
__device__ __forceinline__ int strip_records(int strip, int groups, int record_pieces) {
  constexpr int kStrips = Layout::kBlockStrips;
  return (strip / kStrips * groups * kStrips + strip % kStrips) * record_pieces;
}

/// Self offers what TileLoop asks for, and for its first segment
///   find_weights(): where they are
///   find_rows(): where the rows are, if there is such a segment
template <class S, class Rows, class Self>
class ExpertFill : public TileLoop<S, Self> {
  using Loop = TileLoop<S, Self>;

 protected:
  __device__ __forceinline__ ExpertFill(const ExpertParams<Rows>& params, unsigned char* shared)
      : Loop(params.problem, params.scratch, shared, params.slice_bytes), params_(params) {}

  // The first stages: weights, which where the rows are settled do not depend on the kernel before, and
  // after the wait for it the rows of x.
  __device__ __forceinline__ void prime() {
    constexpr int kAhead = S::kStages - 1;
    Self& self = static_cast<Self&>(*this);
    this->last_fill_ = true;
    self.find_weights();
    const int early = min(this->fill_left_, kAhead);
    this->fill_slot_ = this->ring_;
#pragma unroll 1
    for (int stage = 0; stage < early; ++stage) {
      if constexpr (S::kForm == GroupForm::kAny)
        this->fill_group_ = self.groups_to_fill(this->fill_chunk_).first();
      this->fill_weights(this->fill_slot_, true);
      this->step_fill();
      this->fill_slot_ += this->stage_bytes_;
    }
    this->step_fill_back(early);
    this->fill_left_ -= early;
    if (early > 0) self.find_rows();
    if (params_.settled) ptx::wait_for_predecessor();
    this->fill_slot_ = this->ring_;
#pragma unroll 1
    for (int stage = 0; stage < kAhead; ++stage) {
      if (this->fill_left_ > 0) {
        this->prepare_fill(this->fill_slot_);
        if (stage >= early) this->fill_weights(this->fill_slot_, true);
        self.fill_x(this->fill_slot_, true);
        this->step_fill();
        this->count_fill(1);
      }
      ptx::copy_commit();
      this->fill_slot_ += this->stage_bytes_;
    }
  }

  // Whether this lane copies records of the lower strips: of each group, the first lanes do.
  __device__ __forceinline__ bool copies_lower_records() const {
    int piece = this->lane_;
    if constexpr (S::kForm == GroupForm::kShort) {
#pragma unroll 1
      while (piece >= this->group_bytes() / 16) piece -= this->group_bytes() / 16;
    }
    return piece < this->group_bytes() / 32;
  }

  const ExpertParams<Rows>& params_;
};

}  // namespace marlinq::cuda::sm80
