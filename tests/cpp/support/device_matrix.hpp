// A host matrix on the device of a context, through handles alone, so that it knows of no backend.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "marlinq/handle.hpp"
#include "support/generators.hpp"

namespace marlinq::test {

/// A copy of a matrix with its guard bytes, at the same distance from a 128-byte boundary.
class DeviceMatrix {
 public:
  DeviceMatrix(const ContextHandle& context, const Matrix& host)
      : context_(context),
        buffer_(context.allocate(DType::kFloat16, host.storage_bytes() / 2)),
        view_(host.view_at(buffer_.data(), context.device())) {
    context_.copy(words(host.storage(), {}, host), words(buffer_.data(), context.device(), host));
  }

  ConstMatrixView input() const { return as_const(view_); }
  const MatrixView& view() const { return view_; }

  /// Copies everything, guard bytes too, into a matrix of the same shape.
  void fetch(Matrix& host) const {
    context_.copy(as_const(words(buffer_.data(), context_.device(), host)),
                  words(host.storage(), {}, host));
  }

 private:
  // All bytes as one row of 16-bit words.
  static MatrixView words(void* data, Device device, const Matrix& host) {
    const std::int64_t count = host.storage_bytes() / 2;
    return {data, DType::kFloat16, device, 1, count, count};
  }
  static ConstMatrixView words(const void* data, Device device, const Matrix& host) {
    return as_const(words(const_cast<void*>(data), device, host));
  }

  ContextHandle context_;
  BufferHandle buffer_;
  MatrixView view_;
};

/// A contiguous array of int32 on the device of a context.
class DeviceArray {
 public:
  DeviceArray(const ContextHandle& context, const std::vector<std::int32_t>& values)
      : buffer_(context.allocate(DType::kInt32, static_cast<std::int64_t>(values.size()))) {
    const std::int64_t count = buffer_.size();
    context.copy({values.data(), DType::kInt32, {}, 1, count, count},
                 {buffer_.data(), DType::kInt32, context.device(), 1, count, count});
  }

  ConstArrayView view() const {
    return {buffer_.data(), DType::kInt32, buffer_.device(), buffer_.size()};
  }

 private:
  BufferHandle buffer_;
};

/// Tile lists on the device of a context.
class DeviceTiles {
 public:
  DeviceTiles(const ContextHandle& context, const TokenTiles& tiles)
      : sorted_token_ids_(context, tiles.sorted_token_ids),
        expert_ids_(context, tiles.expert_ids),
        num_tokens_past_padded_(context, {tiles.num_tokens_past_padded}) {}

  FusedTiles view(int block_size, int top_k, std::int64_t num_tokens) const {
    return {.sorted_token_ids = sorted_token_ids_.view(),
            .expert_ids = expert_ids_.view(),
            .num_tokens_past_padded = num_tokens_past_padded_.view(),
            .block_size = block_size,
            .top_k = top_k,
            .num_tokens = num_tokens,
            .topk_weights = std::nullopt};
  }

 private:
  DeviceArray sorted_token_ids_;
  DeviceArray expert_ids_;
  DeviceArray num_tokens_past_padded_;
};

/// Calls run(output) with a copy of `out` on the device of the context; what is there of it, guards
/// included, comes back.
template <class Run>
void with_output(const ContextHandle& context, Matrix& out, const Run& run) {
  const DeviceMatrix output(context, out);
  run(output.view());
  output.fetch(out);
}

/// Runs the first m rows with x and out on the device of the context; what is there of out, guards
/// included, comes back.
inline void forward(const LinearHandle& linear, const ContextHandle& context, const Matrix& x,
                    Matrix& out, std::int64_t m) {
  const DeviceMatrix input(context, x);
  with_output(context, out,
              [&](const MatrixView& output) { linear.forward(context, input.input(), output, m); });
}

}  // namespace marlinq::test
