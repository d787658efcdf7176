// The raw tensors of a layer on their way to the device, piece by piece, while earlier pieces are
// packed.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <deque>
#include <span>
#include <vector>

#include "cuda/completion.hpp"
#include "cuda/copy_ring.hpp"
#include "cuda/cuda_check.hpp"
#include "cuda/handles.hpp"
#include "cuda/raw_pieces.hpp"
#include "marlinq/cuda/cuda_backend.hpp"

namespace marlinq::cuda {

/// Pieces are half a layer, so that one is packed while the other comes, within bounds. Smaller than
/// the least, a piece costs more to ask for than to move; larger than the most, nothing is gained: it
/// is 300 us of the bus.
struct UploadSizes {
  std::int64_t least_piece = std::int64_t{1} << 20;
  std::int64_t most_piece = std::int64_t{16} << 20;
  RingSizes ring;
};

/// What the loads of one context share: two streams, staging memory on the device for two pieces,
/// and the ring for pageable memory. Staging grows to what the largest layer so far needed (its raw
/// tensors, or 2 MB, or at most 32 MB) and stays; only a piece that cannot be small enough gets
/// memory for the time of its load.
class Uploader {
 public:
  /// For the current device, which is `device`.
  explicit Uploader(int device, const UploadSizes& sizes = {})
      : device_(device), sizes_(sizes), ring_(device, copies_.get(), sizes.ring) {}
  Uploader(const Uploader&) = delete;
  Uploader& operator=(const Uploader&) = delete;
  ~Uploader();

  int device() const noexcept { return device_; }

 private:
  friend class LayerUpload;

  // A place for a piece. It is free again when it is packed.
  struct Slot {
    OwnedEvent copied;
    OwnedEvent packed;
  };

  void reserve(std::int64_t layer_bytes, std::int64_t piece_bytes);
  void release();
  unsigned char* memory(std::size_t slot) const noexcept {
    return static_cast<unsigned char*>(staging_.data()) +
           static_cast<std::int64_t>(slot) * slot_bytes_;
  }

  int device_;
  UploadSizes sizes_;
  OwnedStream copies_;
  OwnedStream packing_;
  std::array<Slot, 2> slots_;
  std::size_t slots_used_ = 0;  // 2, or 1 where two would take more than the layer itself
  std::size_t next_slot_ = 0;
  CudaBuffer staging_;
  std::int64_t slot_bytes_ = 0;
  CopyRing ring_;
};

/// A piece on the device.
struct DevicePiece {
  RawPiece raw;
  unsigned char* memory = nullptr;  // what RawPiece's offsets count from
};

/// The upload of a layer, or of several one after the other, which starts with the object. Used by one thread, on which its device is
/// current as long as it lives. Its end waits until nothing reads the layer's tensors.
class LayerUpload {
 public:
  /// The layers are at least what check_structure() returns; their tensors stay borrowed until
  /// finish(). Throws out_of_memory or device.
  LayerUpload(Uploader& uploader, std::span<const GptqWeights> layers);
  LayerUpload(Uploader& uploader, const GptqWeights& layer)
      : LayerUpload(uploader, std::span(&layer, 1)) {}
  LayerUpload(const LayerUpload&) = delete;
  LayerUpload& operator=(const LayerUpload&) = delete;
  ~LayerUpload();

  int device() const noexcept { return uploader_.device(); }
  /// Where kernels pack: what is appended after next() sees that piece.
  cudaStream_t stream() const noexcept { return uploader_.packing_.get(); }

  /// The next piece; null after the last. All work on the one before must be on the stream. Throws
  /// out_of_memory or device.
  const DevicePiece* next();

  /// Copies host memory of the caller's into device memory, in order on the stream; the source is
  /// free on return.
  void put(void* target, const void* source, std::int64_t bytes);

  /// Gives the upload up: waits until nothing of it is under way, neither on the host nor on the
  /// device. For whoever frees memory that pieces were being packed into.
  void abandon() noexcept;

  /// After the last piece: returns when the tensors are no longer needed. Its result is what
  /// whoever uses the packed layer waits for.
  Completion finish();

 private:
  void start_pieces();
  std::size_t slot_of(std::size_t piece) const noexcept {
    return (first_slot_ + piece) % uploader_.slots_used_;
  }

  DeviceGuard guard_;
  RelaxedCapture relaxed_;
  Uploader& uploader_;
  std::vector<RawPiece> pieces_;
  std::deque<CopyRing::Batch> batches_;  // of the pieces that have been started
  std::size_t first_slot_ = 0;
  std::size_t opened_ = 0;  // pieces that next() has given out
  bool reads_pinned_ = false;
  bool ended_ = false;
  DevicePiece current_;
};

}  // namespace marlinq::cuda
