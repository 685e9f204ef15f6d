// Warpgroup matrix products: sm_90a, for *_sm90.cu only. Accumulators are float32 [64, N]: element
// 4 * j + 2 * h + e of a thread is row 16 * warp + lane / 4 + 8 * h, column 8 * j + 2 * (lane % 4)
// + e. Sections of https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace llamatelemetry::ptx {

// #asynchronous-warpgroup-level-matrix-instructions-wgmma-fence
// Before the first product that uses registers which other instructions wrote.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kPending of the committed groups are unfinished.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// No instruction: keeps the compiler from moving uses of an accumulator across this point.
template <int kSize>
__device__ inline void wgmma_hold(float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// #asynchronous-warpgroup-level-matrix-shared-memory-layout-matrix-descriptor
// Rows of 128 bytes, swizzled by 128, in atoms of 8 rows that lie next to each other.
// Row by row along the product's depth (K-major): the atoms run along M or N.
__device__ inline uint64_t k_major_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 | (address & 0x3ffff) >> 4;
}
// Row by row along N (MN-major): the atoms run along the depth, the next 64 columns of N lie
// column_block_bytes further.
__device__ inline uint64_t mn_major_descriptor(uint32_t address, uint32_t column_block_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t{1024 >> 4} << 32 | uint64_t{column_block_bytes >> 4} << 16 |
         (address & 0x3ffff) >> 4;
}

// #asynchronous-warpgroup-level-matrix-instructions-wgmma-mma
// d[64, kN] = a[64, 16] * b[16, kN] (+ d where accumulate).
// Both from shared memory, both K-major.
template <typename T, int kN>
__device__ inline void wgmma_shared(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate);
// a from registers, as the mma.m16n8k16 fragment of each warp's 16 rows; b is MN-major.
template <typename T, int kN>
__device__ inline void wgmma_registers(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b,
                                       bool accumulate);

#define LT_LIST0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LT_LIST1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define LT_LIST2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define LT_LIST3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define LT_LIST4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define LT_LIST5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define LT_LIST6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define LT_LIST7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define LT_LIST8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define LT_LIST9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define LT_LIST10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define LT_LIST11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define LT_LIST12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define LT_LIST13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define LT_LIST14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define LT_LIST15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define LT_OUT(i)                                                                                 \
  "+f"(d[8 * i]), "+f"(d[8 * i + 1]), "+f"(d[8 * i + 2]), "+f"(d[8 * i + 3]), "+f"(d[8 * i + 4]), \
      "+f"(d[8 * i + 5]), "+f"(d[8 * i + 6]), "+f"(d[8 * i + 7])
#define LT_LISTS_64 LT_LIST0 ", " LT_LIST1 ", " LT_LIST2 ", " LT_LIST3
#define LT_OUTS_64 LT_OUT(0), LT_OUT(1), LT_OUT(2), LT_OUT(3)
#define LT_LISTS_80 LT_LIST0 ", " LT_LIST1 ", " LT_LIST2 ", " LT_LIST3 ", " LT_LIST4
#define LT_OUTS_80 LT_OUT(0), LT_OUT(1), LT_OUT(2), LT_OUT(3), LT_OUT(4)
#define LT_LISTS_96 LT_LIST0 ", " LT_LIST1 ", " LT_LIST2 ", " LT_LIST3 ", " LT_LIST4 ", " LT_LIST5
#define LT_OUTS_96 LT_OUT(0), LT_OUT(1), LT_OUT(2), LT_OUT(3), LT_OUT(4), LT_OUT(5)
#define LT_LISTS_128                                                                           \
  LT_LIST0 ", " LT_LIST1 ", " LT_LIST2 ", " LT_LIST3 ", " LT_LIST4 ", " LT_LIST5 ", " LT_LIST6 \
           ", " LT_LIST7
#define LT_OUTS_128 \
  LT_OUT(0), LT_OUT(1), LT_OUT(2), LT_OUT(3), LT_OUT(4), LT_OUT(5), LT_OUT(6), LT_OUT(7)
#define LT_LISTS_192                                                                           \
  LT_LIST0 ", " LT_LIST1 ", " LT_LIST2 ", " LT_LIST3 ", " LT_LIST4 ", " LT_LIST5 ", " LT_LIST6 \
           ", " LT_LIST7 ", " LT_LIST8 ", " LT_LIST9 ", " LT_LIST10 ", " LT_LIST11
#define LT_OUTS_192                                                                       \
  LT_OUT(0), LT_OUT(1), LT_OUT(2), LT_OUT(3), LT_OUT(4), LT_OUT(5), LT_OUT(6), LT_OUT(7), \
      LT_OUT(8), LT_OUT(9), LT_OUT(10), LT_OUT(11)
#define LT_LISTS_256                                                                              \
  LT_LIST0 ", " LT_LIST1 ", " LT_LIST2 ", " LT_LIST3 ", " LT_LIST4 ", " LT_LIST5 ", " LT_LIST6    \
           ", " LT_LIST7 ", " LT_LIST8 ", " LT_LIST9 ", " LT_LIST10 ", " LT_LIST11 ", " LT_LIST12 \
           ", " LT_LIST13 ", " LT_LIST14 ", " LT_LIST15
#define LT_OUTS_256                                                                       \
  LT_OUT(0), LT_OUT(1), LT_OUT(2), LT_OUT(3), LT_OUT(4), LT_OUT(5), LT_OUT(6), LT_OUT(7), \
      LT_OUT(8), LT_OUT(9), LT_OUT(10), LT_OUT(11), LT_OUT(12), LT_OUT(13), LT_OUT(14), LT_OUT(15)

// i0..i5: the operands after the N / 2 of d, as text.
#define LT_WGMMA(T, TYPE, N, i0, i1, i2, i3, i4, i5)                                               \
  template <>                                                                                      \
  __device__ inline void wgmma_shared<T, N>(float (&d)[N / 2], uint64_t a, uint64_t b,             \
                                            bool accumulate) {                                     \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" i2                                           \
                 ", 0;\n"                                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LT_LISTS_##N \
                 "}, %" i0 ", %" i1 ", p, 1, 1, 0, 0;\n}"                                          \
                 : LT_OUTS_##N                                                                     \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                             \
  }                                                                                                \
  template <>                                                                                      \
  __device__ inline void wgmma_registers<T, N>(float (&d)[N / 2], const uint32_t (&a)[4],          \
                                               uint64_t b, bool accumulate) {                      \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" i5                                           \
                 ", 0;\n"                                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LT_LISTS_##N \
                 "}, {%" i0 ", %" i1 ", %" i2 ", %" i3 "}, %" i4 ", p, 1, 1, 1;\n}"                \
                 : LT_OUTS_##N                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                             \
                   "r"(static_cast<int>(accumulate)));                                             \
  }
#define LT_WGMMA_TYPES(N, i0, i1, i2, i3, i4, i5)  \
  LT_WGMMA(Half, "f16", N, i0, i1, i2, i3, i4, i5) \
  LT_WGMMA(BFloat16, "bf16", N, i0, i1, i2, i3, i4, i5)

LT_WGMMA_TYPES(64, "32", "33", "34", "35", "36", "37")
LT_WGMMA_TYPES(80, "40", "41", "42", "43", "44", "45")
LT_WGMMA_TYPES(96, "48", "49", "50", "51", "52", "53")
LT_WGMMA_TYPES(128, "64", "65", "66", "67", "68", "69")
LT_WGMMA_TYPES(192, "96", "97", "98", "99", "100", "101")
LT_WGMMA_TYPES(256, "128", "129", "130", "131", "132", "133")

#undef LT_WGMMA_TYPES
#undef LT_WGMMA
#undef LT_OUT
#undef LT_LIST0
#undef LT_LIST1
#undef LT_LIST2
#undef LT_LIST3
#undef LT_LIST4
#undef LT_LIST5
#undef LT_LIST6
#undef LT_LIST7
#undef LT_LIST8
#undef LT_LIST9
#undef LT_LIST10
#undef LT_LIST11
#undef LT_LIST12
#undef LT_LIST13
#undef LT_LIST14
#undef LT_LIST15
#undef LT_LISTS_64
#undef LT_OUTS_64
#undef LT_LISTS_80
#undef LT_OUTS_80
#undef LT_LISTS_96
#undef LT_OUTS_96
#undef LT_LISTS_128
#undef LT_OUTS_128
#undef LT_LISTS_192
#undef LT_OUTS_192
#undef LT_LISTS_256
#undef LT_OUTS_256

}  // namespace llamatelemetry::ptx
