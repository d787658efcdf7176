// wgmma with A in registers and B in shared memory; compute capability 9.0a.
//
// A is as for mma.m16n8k16, warp w of the four having rows 16 w to 16 w + 15; so is the result: element
// 4 j + i of a lane is that of c[i] in the product with columns 8 j to 8 j + 7.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace marlinq::cuda::ptx {

/// B of 16 rows in a tile of [column][64 rows] of 2-byte elements, whose 128-byte rows have their pieces
/// of 16 bytes swizzled as tensor_map() says. The tile begins at a multiple of 1 KB.
/// The low half of that is what distinguishes tiles: address / 16 in it.
__device__ __forceinline__ uint32_t wgmma_operand_low(uint32_t address) {
  constexpr uint32_t kLead = 1 << 16;  // not used
  return kLead | ((address & 0x3ffff) >> 4);
}

__device__ __forceinline__ uint64_t wgmma_operand_of(uint32_t low) {
  constexpr uint32_t kSwizzle128 = 1 << 30;
  constexpr uint32_t kStride = 1024 / 16;  // of 8 columns
  return uint64_t{kSwizzle128 | kStride} << 32 | low;
}

/// Before the first wgmma, and before one whose registers ordinary instructions have touched.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// The compiler may not move what touches these registers over this place.
template <int kCount>
__device__ __forceinline__ void keep_in_place(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

__device__ __forceinline__ void keep_in_place(uint32_t& value) {
  asm volatile("" : "+r"(value)::"memory");
}

template <int kCount>
__device__ __forceinline__ void keep_in_place(uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

#define MARLINQ_WGMMA_NAMES_1 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MARLINQ_WGMMA_NAMES_2 MARLINQ_WGMMA_NAMES_1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MARLINQ_WGMMA_NAMES_3 MARLINQ_WGMMA_NAMES_2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define MARLINQ_WGMMA_NAMES_4 MARLINQ_WGMMA_NAMES_3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define MARLINQ_WGMMA_NAMES_5 MARLINQ_WGMMA_NAMES_4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define MARLINQ_WGMMA_NAMES_6 MARLINQ_WGMMA_NAMES_5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define MARLINQ_WGMMA_NAMES_7 MARLINQ_WGMMA_NAMES_6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define MARLINQ_WGMMA_NAMES_8 MARLINQ_WGMMA_NAMES_7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define MARLINQ_WGMMA_NAMES_9 MARLINQ_WGMMA_NAMES_8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define MARLINQ_WGMMA_NAMES_10 MARLINQ_WGMMA_NAMES_9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define MARLINQ_WGMMA_NAMES_11 MARLINQ_WGMMA_NAMES_10 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define MARLINQ_WGMMA_NAMES_12 MARLINQ_WGMMA_NAMES_11 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define MARLINQ_WGMMA_NAMES_13 MARLINQ_WGMMA_NAMES_12 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define MARLINQ_WGMMA_NAMES_14 \
  MARLINQ_WGMMA_NAMES_13 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define MARLINQ_WGMMA_NAMES_15 \
  MARLINQ_WGMMA_NAMES_14 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define MARLINQ_WGMMA_NAMES_16 \
  MARLINQ_WGMMA_NAMES_15 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define MARLINQ_WGMMA_SUMS_1 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define MARLINQ_WGMMA_SUMS_2                                                           \
  MARLINQ_WGMMA_SUMS_1, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), \
      "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define MARLINQ_WGMMA_SUMS_3                                                             \
  MARLINQ_WGMMA_SUMS_2, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), \
      "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define MARLINQ_WGMMA_SUMS_4                                                             \
  MARLINQ_WGMMA_SUMS_3, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), \
      "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define MARLINQ_WGMMA_SUMS_5                                                             \
  MARLINQ_WGMMA_SUMS_4, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), \
      "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define MARLINQ_WGMMA_SUMS_6                                                             \
  MARLINQ_WGMMA_SUMS_5, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), \
      "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define MARLINQ_WGMMA_SUMS_7                                                             \
  MARLINQ_WGMMA_SUMS_6, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), \
      "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define MARLINQ_WGMMA_SUMS_8                                                             \
  MARLINQ_WGMMA_SUMS_7, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), \
      "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define MARLINQ_WGMMA_SUMS_9                                                             \
  MARLINQ_WGMMA_SUMS_8, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), \
      "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define MARLINQ_WGMMA_SUMS_10                                                            \
  MARLINQ_WGMMA_SUMS_9, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), \
      "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define MARLINQ_WGMMA_SUMS_11                                                             \
  MARLINQ_WGMMA_SUMS_10, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), \
      "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define MARLINQ_WGMMA_SUMS_12                                                             \
  MARLINQ_WGMMA_SUMS_11, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), \
      "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define MARLINQ_WGMMA_SUMS_13                                                              \
  MARLINQ_WGMMA_SUMS_12, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), \
      "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define MARLINQ_WGMMA_SUMS_14                                                                  \
  MARLINQ_WGMMA_SUMS_13, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), \
      "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define MARLINQ_WGMMA_SUMS_15                                                                  \
  MARLINQ_WGMMA_SUMS_14, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), \
      "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define MARLINQ_WGMMA_SUMS_16                                                                  \
  MARLINQ_WGMMA_SUMS_15, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), \
      "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
// Of TOKENS = 16 PARTS columns; A0 to A3 and B are the numbers of the operands after the sums.
#define MARLINQ_WGMMA(TYPE, TOKENS, PARTS, A0, A1, A2, A3, B)                         \
  asm volatile(                                                                       \
      "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                      \
      "wgmma.mma_async.sync.aligned.m64n" TOKENS "k16.f32." TYPE "." TYPE             \
      " {" MARLINQ_WGMMA_NAMES_##PARTS "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" B \
                                       ", p, 1, 1, 0;\n}"                             \
      : MARLINQ_WGMMA_SUMS_##PARTS                                                    \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define MARLINQ_WGMMA_EITHER(...)              \
  {                                            \
    if constexpr (std::is_same_v<T, __half>) { \
      MARLINQ_WGMMA("f16", __VA_ARGS__);       \
    } else {                                   \
      MARLINQ_WGMMA("bf16", __VA_ARGS__);      \
    }                                          \
  }

/// d += A (64 x 16) * B (16 x 2 kCount). Asynchronous: neither d nor a may be touched before a wgmma_wait()
/// that covers it.
template <class T, int kCount>
__device__ __forceinline__ void wgmma_k16(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kCount % 8 == 0 && kCount >= 8 && (kCount <= 64 || kCount == 72 || kCount == 128));
  if constexpr (kCount == 8) MARLINQ_WGMMA_EITHER("16", 1, "8", "9", "10", "11", "12");
  if constexpr (kCount == 16) MARLINQ_WGMMA_EITHER("32", 2, "16", "17", "18", "19", "20");
  if constexpr (kCount == 24) MARLINQ_WGMMA_EITHER("48", 3, "24", "25", "26", "27", "28");
  if constexpr (kCount == 32) MARLINQ_WGMMA_EITHER("64", 4, "32", "33", "34", "35", "36");
  if constexpr (kCount == 40) MARLINQ_WGMMA_EITHER("80", 5, "40", "41", "42", "43", "44");
  if constexpr (kCount == 48) MARLINQ_WGMMA_EITHER("96", 6, "48", "49", "50", "51", "52");
  if constexpr (kCount == 56) MARLINQ_WGMMA_EITHER("112", 7, "56", "57", "58", "59", "60");
  if constexpr (kCount == 64) MARLINQ_WGMMA_EITHER("128", 8, "64", "65", "66", "67", "68");
  if constexpr (kCount == 72) MARLINQ_WGMMA_EITHER("144", 9, "72", "73", "74", "75", "76");
  if constexpr (kCount == 128) MARLINQ_WGMMA_EITHER("256", 16, "128", "129", "130", "131", "132");
}

#undef MARLINQ_WGMMA_NAMES_1
#undef MARLINQ_WGMMA_NAMES_2
#undef MARLINQ_WGMMA_NAMES_3
#undef MARLINQ_WGMMA_NAMES_4
#undef MARLINQ_WGMMA_NAMES_5
#undef MARLINQ_WGMMA_NAMES_6
#undef MARLINQ_WGMMA_NAMES_7
#undef MARLINQ_WGMMA_NAMES_8
#undef MARLINQ_WGMMA_NAMES_9
#undef MARLINQ_WGMMA_NAMES_10
#undef MARLINQ_WGMMA_NAMES_11
#undef MARLINQ_WGMMA_NAMES_12
#undef MARLINQ_WGMMA_NAMES_13
#undef MARLINQ_WGMMA_NAMES_14
#undef MARLINQ_WGMMA_NAMES_15
#undef MARLINQ_WGMMA_NAMES_16
#undef MARLINQ_WGMMA_SUMS_1
#undef MARLINQ_WGMMA_SUMS_2
#undef MARLINQ_WGMMA_SUMS_3
#undef MARLINQ_WGMMA_SUMS_4
#undef MARLINQ_WGMMA_SUMS_5
#undef MARLINQ_WGMMA_SUMS_6
#undef MARLINQ_WGMMA_SUMS_7
#undef MARLINQ_WGMMA_SUMS_8
#undef MARLINQ_WGMMA_SUMS_9
#undef MARLINQ_WGMMA_SUMS_10
#undef MARLINQ_WGMMA_SUMS_11
#undef MARLINQ_WGMMA_SUMS_12
#undef MARLINQ_WGMMA_SUMS_13
#undef MARLINQ_WGMMA_SUMS_14
#undef MARLINQ_WGMMA_SUMS_15
#undef MARLINQ_WGMMA_SUMS_16
#undef MARLINQ_WGMMA
#undef MARLINQ_WGMMA_EITHER

}  // namespace marlinq::cuda::ptx
