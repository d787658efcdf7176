// The raw tensors of a layer on their way to the device, piece by piece, while earlier pieces are
// packed.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <deque>
#include <vector>

#include "cuda/completion.hpp"
#include "cuda/copy_ring.hpp"
#include "cuda/cuda_check.hpp"
#include "cuda/handles.hpp"
#include "cuda/layers_to_load.hpp"
#include "cuda/raw_pieces.hpp"
#include "marlinq/cuda/cuda_backend.hpp"

namespace marlinq::cuda {

/// Pieces are half a layer, so that one is packed while the other comes, within bounds. Smaller than
/// the least, a piece costs more to ask for than to move; larger than the most, nothing is gained: it
/// is 300 us of the bus. Small pieces travel together. Those of a stack may fill a thirty-second part of
/// it and `of_stack` at most.
struct UploadSizes {
  std::int64_t least_piece = std::int64_t{1} << 20;
  std::int64_t most_piece = std::int64_t{16} << 20;
  std::int64_t of_stack = std::int64_t{4} << 20;
  RingSizes ring;
};

/// What the loads of one context share: streams, staging memory on the device for two shipments,
/// and the ring for pageable memory. Staging grows to what the largest layer so far needed (its raw
/// tensors, or 2 MB, or at most 32 MB; for a stack at least a sixteenth of its tensors or 8 MB) and
/// stays; only a piece that cannot be small enough gets memory for the time of its load.
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

  // A place for a shipment. It is free again when it is packed.
  struct Slot {
    OwnedStream fetching;
    OwnedEvent copied;
    OwnedEvent packed;
    bool reads_pinned = false;  // of the caller's
  };

  // Room for shipments of `bytes`; for two of them, if that is not much more than `room`.
  void reserve(std::int64_t bytes, std::int64_t room);
  void release();
  void synchronise() noexcept;
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

/// Pieces that have come to the device together.
struct DevicePieces {
  std::vector<RawPiece> raw;
  unsigned char* memory = nullptr;  // what the offsets of RawPiece count from
};

/// The upload of a layer, or of the experts of a stack one after the other, which starts with the
/// object. Used by one thread, on which its device is current as long as it lives. Its end waits until
/// nothing reads the tensors. While they travel, it has their numbers checked.
class LayerUpload {
 public:
  /// The tensors stay borrowed until finish(). Throws what the layers do, out_of_memory or device.
  LayerUpload(Uploader& uploader, LayersToLoad& layers);
  LayerUpload(const LayerUpload&) = delete;
  LayerUpload& operator=(const LayerUpload&) = delete;
  ~LayerUpload();

  int device() const noexcept { return uploader_.device(); }
  /// Where kernels pack: what is appended after next() sees that piece.
  cudaStream_t stream() const noexcept { return uploader_.packing_.get(); }

  /// The next pieces; null after the last. All work on those before must be on the stream. Throws
  /// as the constructor.
  const DevicePieces* next();

  /// From the first layer on once more.
  void start_again();

  /// Copies host memory of the caller's into device memory, to `count` places that are `pitch` bytes
  /// apart, in order on the stream; the source is free on return.
  void put(void* target, const void* source, std::int64_t bytes, std::int64_t count = 1,
           std::int64_t pitch = 0);

  /// Gives the upload up: waits until nothing of it is under way, neither on the host nor on the
  /// device. For whoever frees memory that pieces were being packed into.
  void abandon() noexcept;

  /// After the last pieces: returns when the tensors are no longer needed. Its result is what
  /// whoever uses the packed layer waits for.
  Completion finish();

 private:
  // What takes a slot.
  struct Shipment {
    std::size_t slot = 0;
    DevicePieces pieces;
    CopyRing::Batch batch;
    bool fetched = false;  // by a kernel on the slot's own stream
    double share = 0;      // of all layers, that has been sent with it
  };

  void start();
  bool plan_layer();
  bool load(Shipment& shipment);
  void send(Shipment& shipment);

  DeviceGuard guard_;
  RelaxedCapture relaxed_;
  Uploader& uploader_;
  LayersToLoad& layers_;
  std::int64_t target_ = 0;  // bytes of a shipment
  std::int64_t room_ = 0;    // for two of them
  std::size_t next_layer_ = 0;
  std::deque<RawPiece> pending_;  // of the layers up to next_layer_
  std::int64_t weights_sent_ = 0;
  std::deque<Shipment> shipments_;  // on their way
  bool opened_ = false;             // next() has given out the first of them
  bool asked_ = false;              // next() has been called
  bool ended_ = false;
};

}  // namespace marlinq::cuda
