// A host matrix on the device of a context, through handles alone, so that it knows of no backend.
#pragma once

#include <cstdint>

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

/// Runs the first m rows with x and out on the device of the context; what is there of out, guards
/// included, comes back.
inline void forward(const LinearHandle& linear, const ContextHandle& context, const Matrix& x,
                    Matrix& out, std::int64_t m) {
  const DeviceMatrix input(context, x);
  const DeviceMatrix output(context, out);
  linear.forward(context, input.input(), output.view(), m);
  output.fetch(out);
}

}  // namespace marlinq::test
