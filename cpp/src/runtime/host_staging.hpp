// Arrays in host memory for a backend whose memory is elsewhere: copied to buffers of a context, and
// back.
#pragma once

#include <array>
#include <cstdint>
#include <limits>

#include "core/integers.hpp"
#include "core/matrix_checks.hpp"
#include "marlinq/backend.hpp"

namespace marlinq::detail {

/// Buffers that only grow, one for what a forward reads and one for what it writes.
template <BackendQuantMarlin B>
class HostStaging {
 public:
  std::int64_t allocations() const noexcept { return allocations_; }

  /// Runs the first m rows of views of which any may be of host memory. Returns when the stream is
  /// done.
  void forward(typename B::Context& context, const Linear<B>& linear, const ConstMatrixView& input,
               const MatrixView& output, std::int64_t m) {
    check_rows(m);
    const bool input_here = input.device.kind == DeviceKind::kCpu;
    const bool output_here = output.device.kind == DeviceKind::kCpu;
    if (input_here) check_input(input, "x", Device{}, m, linear.in_features());
    if (output_here) {
      check_output(output, "out", Device{}, m, linear.out_features(), input.dtype);
    }
    B::synchronise(
        context);  // first, so that a stream which cannot be waited for is left as it was
    ConstMatrixView x = input;
    MatrixView y = output;
    if (input_here) {
      const MatrixView staged = place(context, 0, input.dtype, m, input.cols);
      B::copy(context, first_rows(input, m), staged);
      x = as_const(staged);
    }
    if (output_here) y = place(context, 1, output.dtype, m, output.cols);
    linear.forward(context, x, y, m);
    if (output_here) B::copy(context, as_const(y), first_rows(output, m));
    B::synchronise(context);
  }

 private:
  static constexpr std::int64_t kRowAlignment =
      16;  // elements; rows of any dtype start at 16 bytes

  template <class View>
  static View first_rows(View view, std::int64_t m) {
    view.rows = m;
    return view;
  }

  MatrixView place(typename B::Context& context, std::size_t slot, DType dtype, std::int64_t rows,
                   std::int64_t cols) {
    const std::int64_t stride = round_up(cols, kRowAlignment);
    if (rows > std::numeric_limits<std::int64_t>::max() / 8 / stride) {
      throw Error(ErrorCode::kOutOfMemory, concat("cannot allocate ", rows, " rows of ", cols));
    }
    // Held as 32-bit words, whatever they are used for.
    const std::int64_t words =
        ceil_div(rows * stride * static_cast<std::int64_t>(size_of(dtype)), std::int64_t{4});
    if (buffers_[slot].size() < words) {
      buffers_[slot] = B::allocate(context, DType::kInt32, words);
      ++allocations_;
    }
    return {.data = buffers_[slot].data(),
            .dtype = dtype,
            .device = context.device(),
            .rows = rows,
            .cols = cols,
            .row_stride = stride};
  }

  std::array<typename B::Buffer, 2> buffers_;
  std::int64_t allocations_ = 0;
};

}  // namespace marlinq::detail
