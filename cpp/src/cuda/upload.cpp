#include "cuda/upload.hpp"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/integers.hpp"
#include "cuda/fetch.hpp"

namespace marlinq::cuda {
namespace {

// Alignment must not turn two halves into three pieces.
constexpr std::int64_t kSlack = std::int64_t{64} << 10;

// The bytes of a tensor from which on the runtime's copy is quicker than a kernel that fetches it; and
// those of a shipment of rows that are apart, which the runtime copies at half of what the bus takes,
// from which on the kernel is quicker even where it holds up the allocation of the packed memory.
constexpr std::int64_t kWorthACopy = std::int64_t{1} << 20;
constexpr std::int64_t kWorthAKernel = std::int64_t{8} << 20;

// How the device can reach rows of host memory.
struct Reach {
  bool pinned = false;
  const unsigned char* mapped = nullptr;  // where kernels read the first; null: they cannot
};

Reach reach_of(const RawRows& rows) {
  const auto look = [](const void* address) {
    cudaPointerAttributes attributes{};
    MARLINQ_CUDA_CHECK(cudaPointerGetAttributes(&attributes, address));
    return attributes;
  };
  const std::int64_t last = (rows.rows - 1) * rows.pitch + rows.row_bytes - 1;
  const cudaPointerAttributes begin = look(rows.data);
  if (begin.type != cudaMemoryTypeHost) return {};
  const cudaPointerAttributes end = look(rows.data + last);
  if (end.type != cudaMemoryTypeHost) return {};
  const auto* first = static_cast<const unsigned char*>(begin.devicePointer);
  const bool whole = first != nullptr && end.devicePointer == first + last;
  return {.pinned = true, .mapped = whole ? first : nullptr};
}

void copy(unsigned char* target, const RawRows& rows, cudaStream_t stream) {
  if (rows.contiguous()) {
    MARLINQ_CUDA_CHECK(cudaMemcpyAsync(target, rows.data, static_cast<std::size_t>(rows.bytes()),
                                       cudaMemcpyHostToDevice, stream));
    return;
  }
  const auto row_bytes = static_cast<std::size_t>(rows.row_bytes);
  MARLINQ_CUDA_CHECK(cudaMemcpy2DAsync(
      target, row_bytes, rows.data, static_cast<std::size_t>(rows.pitch), row_bytes,
      static_cast<std::size_t>(rows.rows), cudaMemcpyHostToDevice, stream));
}

}  // namespace

Uploader::~Uploader() {
  const RelaxedCapture relaxed;
  synchronise();
}

// At process exit the driver may be gone, and errors mean nothing here.
void Uploader::synchronise() noexcept {
  (void)cudaStreamSynchronize(copies_.get());
  for (const Slot& slot : slots_) (void)cudaStreamSynchronize(slot.fetching.get());
  (void)cudaStreamSynchronize(packing_.get());
}

void Uploader::reserve(std::int64_t bytes, std::int64_t room) {
  if (bytes <= slot_bytes_) return;
  release();  // first, so that both are never held at once
  bytes = round_up(std::max(bytes, sizes_.least_piece), 256);
  const bool two = 2 * bytes <= room + 2 * sizes_.least_piece;
  slots_used_ = two ? 2 : 1;
  next_slot_ = 0;
  staging_ = CudaBuffer(device_, DType::kInt32, static_cast<std::int64_t>(slots_used_) * bytes / 4);
  slot_bytes_ = bytes;
}

void Uploader::release() {
  MARLINQ_CUDA_CHECK(cudaStreamSynchronize(packing_.get()));
  staging_ = CudaBuffer();
  slot_bytes_ = 0;
}

LayerUpload::LayerUpload(Uploader& uploader, LayersToLoad& layers)
    : guard_(uploader.device()), uploader_(uploader), layers_(layers) {
  const UploadSizes& sizes = uploader.sizes_;
  const std::int64_t bytes = raw_bytes(layers.structure(0));
  const std::int64_t all = bytes * static_cast<std::int64_t>(layers.size());
  const std::int64_t of_stack = std::min(all / 32, sizes.of_stack);
  target_ = std::clamp(std::max(bytes / 2 + kSlack, of_stack), sizes.least_piece, sizes.most_piece);
  room_ = std::max(bytes, 2 * of_stack);
  for (Uploader::Slot& slot : uploader.slots_) slot.reads_pinned = false;
  try {
    plan_layer();
    std::int64_t largest = of_stack;
    for (const RawPiece& piece : pending_) largest = std::max(largest, piece.bytes);
    uploader_.reserve(largest, room_);
    start();
  } catch (...) {
    abandon();
    throw;
  }
}

LayerUpload::~LayerUpload() { abandon(); }

void LayerUpload::abandon() noexcept {
  if (ended_) return;
  ended_ = true;
  for (Shipment& shipment : shipments_) uploader_.ring_.cancel(shipment.batch);
  uploader_.synchronise();
}

void LayerUpload::start_again() {
  abandon();
  ended_ = false;
  shipments_.clear();
  pending_.clear();
  next_layer_ = 0;
  weights_sent_ = 0;
  opened_ = false;
  asked_ = false;
  start();
}

bool LayerUpload::plan_layer() {
  if (next_layer_ == layers_.size()) return false;
  for (RawPiece& piece : plan_pieces(layers_.structure(next_layer_), target_)) {
    piece.layer = next_layer_;
    pending_.push_back(piece);
  }
  ++next_layer_;
  return true;
}

void LayerUpload::start() {
  while (shipments_.size() < uploader_.slots_used_) {
    Shipment& shipment = shipments_.emplace_back();
    if (!load(shipment)) {
      shipments_.pop_back();
      return;
    }
    send(shipment);
  }
}

// Takes as many pieces as fit. False: there are no more, or the next one needs more room than there is
// as long as others are on their way.
bool LayerUpload::load(Shipment& shipment) {
  std::vector<RawPiece>& pieces = shipment.pieces.raw;
  std::int64_t bytes = 0;
  while (!pending_.empty() || plan_layer()) {
    RawPiece& piece = pending_.front();
    if (pieces.empty()) {
      if (piece.bytes > uploader_.slot_bytes_ && shipments_.size() > 1) return false;
      uploader_.reserve(piece.bytes, room_);
    } else if (bytes + piece.bytes > std::min(target_, uploader_.slot_bytes_)) {
      break;
    }
    piece.move(bytes);
    bytes += piece.bytes;
    weights_sent_ += piece.rows * piece.columns;
    pieces.push_back(piece);
    pending_.pop_front();
  }
  if (pieces.empty()) return false;
  const GptqWeights& first = layers_.structure(0);
  shipment.share = static_cast<double>(weights_sent_) /
                   (static_cast<double>(first.k * first.n) * static_cast<double>(layers_.size()));
  shipment.slot = uploader_.next_slot_;
  shipment.pieces.memory = uploader_.memory(shipment.slot);
  uploader_.next_slot_ = (shipment.slot + 1) % uploader_.slots_used_;
  return true;
}

void LayerUpload::send(Shipment& shipment) {
  Uploader::Slot& slot = uploader_.slots_[shipment.slot];
  std::vector<RawRows> pinned;
  std::vector<FetchRows> fetched;
  CopyRing::Batch& batch = shipment.batch;
  batch.target = shipment.pieces.memory;
  batch.after = slot.packed.get();
  std::int64_t bytes = 0;
  bool apart = false;
  for (const RawPiece& piece : shipment.pieces.raw) {
    for (const RawRows& rows : {piece.qweight, piece.scales, piece.qzeros}) {
      if (rows.rows == 0) continue;
      const Reach reach = reach_of(rows);
      (reach.pinned ? pinned : batch.rows).push_back(rows);
      if (reach.mapped == nullptr) continue;
      const bool whole = rows.contiguous();
      if (!whole && rows.row_bytes % kFetchUnit != 0) continue;
      bytes += rows.bytes();
      apart = apart || !whole;
      fetched.push_back({.from = reach.mapped,
                         .to = batch.target + rows.offset,
                         .rows = whole ? 1 : rows.rows,
                         .row_bytes = whole ? rows.bytes() : rows.row_bytes,
                         .pitch = rows.pitch});
    }
  }
  if (!pinned.empty()) slot.reads_pinned = true;
  const auto tensors = static_cast<std::int64_t>(fetched.size());
  // cudaMalloc waits for kernels, though not for copies. Where a layer's first pieces are all of it, or
  // much of it, they had better be copies.
  const bool holds_up = !asked_ && layers_.size() == 1;
  const bool pays =
      (!holds_up && bytes < tensors * kWorthACopy) || (apart && bytes >= kWorthAKernel);
  if (pays && batch.rows.empty() && fetched.size() == pinned.size()) {
    shipment.fetched = true;
    MARLINQ_CUDA_CHECK(cudaStreamWaitEvent(slot.fetching.get(), slot.packed.get(), 0));
    fetch_rows(fetched, slot.fetching.get());
    return;
  }
  if (!pinned.empty()) uploader_.ring_.open(batch);
  for (const RawRows& rows : pinned) {
    copy(batch.target + rows.offset, rows, uploader_.copies_.get());
  }
  if (!batch.rows.empty()) uploader_.ring_.start(batch);
}

const DevicePieces* LayerUpload::next() {
  asked_ = true;
  if (opened_) {
    const Shipment& packed = shipments_.front();
    MARLINQ_CUDA_CHECK(cudaEventRecord(uploader_.slots_[packed.slot].packed.get(), stream()));
    const double share = packed.share;
    shipments_.pop_front();
    opened_ = false;
    start();
    layers_.check_numbers(share);
  }
  if (shipments_.empty()) return nullptr;
  Shipment& shipment = shipments_.front();
  uploader_.ring_.wait(shipment.batch);
  Uploader::Slot& slot = uploader_.slots_[shipment.slot];
  cudaStream_t from = shipment.fetched ? slot.fetching.get() : uploader_.copies_.get();
  MARLINQ_CUDA_CHECK(cudaEventRecord(slot.copied.get(), from));
  MARLINQ_CUDA_CHECK(cudaStreamWaitEvent(stream(), slot.copied.get(), 0));
  opened_ = true;
  return &shipment.pieces;
}

void LayerUpload::put(void* target, const void* source, std::int64_t bytes, std::int64_t count,
                      std::int64_t pitch) {
  uploader_.ring_.put(target, source, bytes, count, pitch, stream());
}

Completion LayerUpload::finish() {
  Completion packed = Completion::of(stream());
  (void)layers_.checked();
  for (const Uploader::Slot& slot : uploader_.slots_) {
    if (slot.reads_pinned) MARLINQ_CUDA_CHECK(cudaEventSynchronize(slot.copied.get()));
  }
  ended_ = true;
  if (uploader_.slots_used_ == 1 || uploader_.slot_bytes_ > uploader_.sizes_.most_piece)
    uploader_.release();
  return packed;
}

}  // namespace marlinq::cuda
