#include "cuda/upload.hpp"

#include <algorithm>
#include <cstdint>

#include "core/integers.hpp"

namespace marlinq::cuda {
namespace {

// Alignment must not turn two halves into three pieces.
constexpr std::int64_t kSlack = std::int64_t{64} << 10;

bool is_pinned(const void* address) {
  cudaPointerAttributes attributes{};
  MARLINQ_CUDA_CHECK(cudaPointerGetAttributes(&attributes, address));
  return attributes.type == cudaMemoryTypeHost;
}

bool is_pinned(const RawRows& rows) {
  return is_pinned(rows.data) &&
         is_pinned(rows.data + (rows.rows - 1) * rows.pitch + rows.row_bytes - 1);
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
  // At process exit the driver may be gone, and errors mean nothing here.
  const RelaxedCapture relaxed;
  (void)cudaStreamSynchronize(copies_.get());
  (void)cudaStreamSynchronize(packing_.get());
}

void Uploader::reserve(std::int64_t layer_bytes, std::int64_t piece_bytes) {
  if (piece_bytes <= slot_bytes_) return;
  release();  // first, so that both are never held at once
  const std::int64_t bytes = round_up(std::max(piece_bytes, sizes_.least_piece), 256);
  const bool two = 2 * bytes <= layer_bytes + 2 * sizes_.least_piece;
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

LayerUpload::LayerUpload(Uploader& uploader, std::span<const GptqWeights> layers)
    : guard_(uploader.device()), uploader_(uploader) {
  std::int64_t bytes = 0;  // of the largest layer
  for (const GptqWeights& layer : layers) bytes = std::max(bytes, raw_bytes(layer));
  const UploadSizes& sizes = uploader.sizes_;
  const std::int64_t target = std::clamp(bytes / 2 + kSlack, sizes.least_piece, sizes.most_piece);
  std::int64_t largest = 0;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    for (RawPiece& piece : plan_pieces(layers[i], target)) {
      piece.layer = i;
      largest = std::max(largest, piece.bytes);
      pieces_.push_back(piece);
    }
  }
  uploader_.reserve(bytes, largest);
  first_slot_ = uploader_.next_slot_;
  try {
    start_pieces();
  } catch (...) {
    abandon();
    throw;
  }
}

LayerUpload::~LayerUpload() { abandon(); }

void LayerUpload::abandon() noexcept {
  if (ended_) return;
  ended_ = true;
  for (CopyRing::Batch& batch : batches_) uploader_.ring_.cancel(batch);
  (void)cudaStreamSynchronize(uploader_.copies_.get());
  (void)cudaStreamSynchronize(uploader_.packing_.get());
}

void LayerUpload::start_pieces() {
  while (batches_.size() < pieces_.size() && batches_.size() < opened_ + uploader_.slots_used_) {
    const RawPiece& piece = pieces_[batches_.size()];
    const std::size_t slot = slot_of(batches_.size());
    CopyRing::Batch& batch = batches_.emplace_back();
    batch.target = uploader_.memory(slot);
    batch.after = uploader_.slots_[slot].packed.get();
    for (const RawRows* rows : {&piece.qweight, &piece.scales, &piece.qzeros}) {
      if (rows->rows == 0) continue;
      if (!is_pinned(*rows)) {
        batch.rows.push_back(*rows);
        continue;
      }
      uploader_.ring_.open(batch);
      reads_pinned_ = true;
      copy(batch.target + rows->offset, *rows, uploader_.copies_.get());
    }
    if (!batch.rows.empty()) uploader_.ring_.start(batch);
  }
}

const DevicePiece* LayerUpload::next() {
  if (opened_ > 0) {
    MARLINQ_CUDA_CHECK(
        cudaEventRecord(uploader_.slots_[slot_of(opened_ - 1)].packed.get(), stream()));
    start_pieces();
  }
  if (opened_ == pieces_.size()) return nullptr;
  CopyRing::Batch& batch = batches_[opened_];
  uploader_.ring_.wait(batch);
  cudaEvent_t copied = uploader_.slots_[slot_of(opened_)].copied.get();
  MARLINQ_CUDA_CHECK(cudaEventRecord(copied, uploader_.copies_.get()));
  MARLINQ_CUDA_CHECK(cudaStreamWaitEvent(stream(), copied, 0));
  current_ = {.raw = pieces_[opened_++], .memory = batch.target};
  return &current_;
}

void LayerUpload::put(void* target, const void* source, std::int64_t bytes) {
  uploader_.ring_.put(target, source, bytes, stream());
}

Completion LayerUpload::finish() {
  Completion packed = Completion::of(stream());
  const std::size_t last = slot_of(pieces_.size() - 1);
  if (reads_pinned_) {
    MARLINQ_CUDA_CHECK(cudaEventSynchronize(uploader_.slots_[last].copied.get()));
  }
  uploader_.next_slot_ = slot_of(pieces_.size());
  ended_ = true;
  if (uploader_.slots_used_ == 1 || uploader_.slot_bytes_ > uploader_.sizes_.most_piece)
    uploader_.release();
  return packed;
}

}  // namespace marlinq::cuda
