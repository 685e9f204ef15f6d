// Warpgroup matrix products of a from registers and a K-major b: sm_90a, for *_sm90.cu only. The
// accumulators, the fences and the descriptors are those of wgmma.cuh.
// Sections of https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "ptx/wgmma.cuh"

namespace llamatelemetry::ptx {

// #asynchronous-warpgroup-level-matrix-instructions-wgmma-mma
// d[64, kN] += a[64, 16] * b[16, kN], a as the mma.m16n8k16 fragment of each warp's 16 rows.
template <typename T, int kN>
__device__ inline void wgmma_registers_k_major(float (&d)[kN / 2], const uint32_t (&a)[4],
                                               uint64_t b);

#define LT_LIST0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LT_LIST1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define LT_LIST2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define LT_LIST3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define LT_LIST4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define LT_LIST5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define LT_LIST6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define LT_LIST7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define LT_OUT(i)                                                                                 \
  "+f"(d[8 * i]), "+f"(d[8 * i + 1]), "+f"(d[8 * i + 2]), "+f"(d[8 * i + 3]), "+f"(d[8 * i + 4]), \
      "+f"(d[8 * i + 5]), "+f"(d[8 * i + 6]), "+f"(d[8 * i + 7])
#define LT_LISTS_16 LT_LIST0
#define LT_OUTS_16 LT_OUT(0)
#define LT_LISTS_32 LT_LIST0 ", " LT_LIST1
#define LT_OUTS_32 LT_OUT(0), LT_OUT(1)
#define LT_LISTS_64 LT_LISTS_32 ", " LT_LIST2 ", " LT_LIST3
#define LT_OUTS_64 LT_OUTS_32, LT_OUT(2), LT_OUT(3)
#define LT_LISTS_128 LT_LISTS_64 ", " LT_LIST4 ", " LT_LIST5 ", " LT_LIST6 ", " LT_LIST7
#define LT_OUTS_128 LT_OUTS_64, LT_OUT(4), LT_OUT(5), LT_OUT(6), LT_OUT(7)

// i0..i4: the operands after the N / 2 of d, as text.
#define LT_WGMMA(T, TYPE, N, i0, i1, i2, i3, i4)                                                   \
  template <>                                                                                      \
  __device__ inline void wgmma_registers_k_major<T, N>(float (&d)[N / 2], const uint32_t (&a)[4],  \
                                                       uint64_t b) {                               \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LT_LISTS_##N \
                 "}, {%" i0 ", %" i1 ", %" i2 ", %" i3 "}, %" i4 ", 1, 1, 1, 0;"                   \
                 : LT_OUTS_##N                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                            \
  }
#define LT_WGMMA_TYPES(N, i0, i1, i2, i3, i4)  \
  LT_WGMMA(Half, "f16", N, i0, i1, i2, i3, i4) \
  LT_WGMMA(BFloat16, "bf16", N, i0, i1, i2, i3, i4)

LT_WGMMA_TYPES(16, "8", "9", "10", "11", "12")
LT_WGMMA_TYPES(32, "16", "17", "18", "19", "20")
LT_WGMMA_TYPES(64, "32", "33", "34", "35", "36")
LT_WGMMA_TYPES(128, "64", "65", "66", "67", "68")

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
#undef LT_LISTS_16
#undef LT_OUTS_16
#undef LT_LISTS_32
#undef LT_OUTS_32
#undef LT_LISTS_64
#undef LT_OUTS_64
#undef LT_LISTS_128
#undef LT_OUTS_128

}  // namespace llamatelemetry::ptx
