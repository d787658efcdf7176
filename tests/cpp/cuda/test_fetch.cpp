// Fetching rows of pinned memory by a kernel, on a real device.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda/fetch.hpp"
#include "marlinq/cuda/cuda_backend.hpp"
#include "support/generators.hpp"

namespace marlinq {
namespace {

using cuda::FetchRows;
using Bytes = std::vector<unsigned char>;

void check(cudaError_t status) { ASSERT_EQ(status, cudaSuccess) << cudaGetErrorString(status); }

struct Rows {
  std::int64_t offset;  // of the pinned memory
  std::int64_t rows;
  std::int64_t row_bytes;
  std::int64_t pitch;

  std::int64_t bytes() const { return rows * row_bytes; }
  std::int64_t room() const { return (bytes() + 255) / 256 * 256; }
};

class FetchTest : public ::testing::Test {
 protected:
  static constexpr std::int64_t kBytes = std::int64_t{4} << 20;
  static constexpr unsigned char kUntouched = 0xA5;

  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "no CUDA device";
    void* memory = nullptr;
    check(cudaHostAlloc(&memory, kBytes, cudaHostAllocDefault));
    host_ = static_cast<unsigned char*>(memory);
    test::Random random(3);
    for (std::int64_t i = 0; i < kBytes; ++i) {
      host_[i] = static_cast<unsigned char>(random.below(256));
    }
  }
  void TearDown() override {
    if (host_ != nullptr) check(cudaFreeHost(host_));
  }

  // All of them at once, each to a place of its own.
  void expect_fetched(const std::vector<Rows>& all) const {
    std::int64_t room = 0;
    for (const Rows& rows : all) room += rows.room() + 256;
    const cuda::CudaBuffer device(0, DType::kInt32, room / 4);
    check(cudaMemset(device.data(), kUntouched, static_cast<std::size_t>(room)));
    std::vector<FetchRows> fetched;
    std::int64_t at = 0;
    for (const Rows& rows : all) {
      fetched.push_back({.from = host_ + rows.offset,
                         .to = static_cast<unsigned char*>(device.data()) + at,
                         .rows = rows.rows,
                         .row_bytes = rows.row_bytes,
                         .pitch = rows.pitch});
      at += rows.room() + 256;
    }
    check(cudaDeviceSynchronize());
    cuda::fetch_rows(fetched, nullptr);
    check(cudaDeviceSynchronize());
    Bytes actual(static_cast<std::size_t>(room));
    check(cudaMemcpy(actual.data(), device.data(), actual.size(), cudaMemcpyDeviceToHost));
    at = 0;
    for (const Rows& rows : all) {
      for (std::int64_t row = 0; row < rows.rows; ++row) {
        ASSERT_EQ(std::memcmp(actual.data() + at + row * rows.row_bytes,
                              host_ + rows.offset + row * rows.pitch,
                              static_cast<std::size_t>(rows.row_bytes)),
                  0)
            << rows.offset << ", " << rows.rows << " x " << rows.row_bytes << ", row " << row;
      }
      const std::int64_t written = (rows.bytes() + 15) / 16 * 16;
      for (std::int64_t i = written; i < rows.room() + 256; ++i) {
        ASSERT_EQ(actual[static_cast<std::size_t>(at + i)], kUntouched)
            << rows.offset << ", " << rows.bytes() << " bytes";
      }
      at += rows.room() + 256;
    }
  }

  unsigned char* host_ = nullptr;
};

TEST_F(FetchTest, FromAnyAddress) {
  std::vector<Rows> all;
  for (std::int64_t offset = 0; offset < 17; ++offset) {
    for (const std::int64_t bytes : {1, 2, 15, 16, 17, 31, 32, 100, 4096, 16384, 16385, 100000}) {
      all.push_back({offset + 64 * static_cast<std::int64_t>(all.size()), 1, bytes, bytes});
    }
  }
  expect_fetched(all);
}

TEST_F(FetchTest, ToTheLastByteOfAnAllocation) {
  for (std::int64_t bytes = 1; bytes < 40; ++bytes) {
    expect_fetched({{kBytes - bytes, 1, bytes, bytes}});
  }
}

TEST_F(FetchTest, RowsThatAreApart) {
  std::vector<Rows> all;
  for (const std::int64_t row_bytes : {16, 48, 256, 5008}) {
    for (const std::int64_t gap : {1, 2, 8, 16, 1000}) {
      for (const std::int64_t rows : {2, 7, 100}) {
        all.push_back(
            {3 * static_cast<std::int64_t>(all.size()), rows, row_bytes, row_bytes + gap});
      }
    }
  }
  expect_fetched(all);
}

}  // namespace
}  // namespace marlinq
