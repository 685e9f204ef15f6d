// Warpgroup matrix products of a from registers and a K-major b: sm_90a, for *_sm90.cu only. The
// accumulators, the fences and the descriptors are those of wgmma.cuh.
// Sections of https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "ptx/wgmma.cuh"
#include "ptx/wgmma_lists.cuh"

namespace llamatelemetry::ptx {

// #asynchronous-warpgroup-level-matrix-instructions-wgmma-mma
// d[64, kN] = a[64, 16] * b[16, kN] (+ d where accumulate), a as the mma.m16n8k16 fragment of each
// warp's 16 rows.
template <typename T, int kN>
__device__ inline void wgmma_registers_k_major(float (&d)[kN / 2], const uint32_t (&a)[4],
                                               uint64_t b, bool accumulate);

// i0..i5: the operands after the N / 2 of d, as text.
#define LT_WGMMA(T, TYPE, N, i0, i1, i2, i3, i4, i5)                                               \
  template <>                                                                                      \
  __device__ inline void wgmma_registers_k_major<T, N>(float (&d)[N / 2], const uint32_t (&a)[4],  \
                                                       uint64_t b, bool accumulate) {              \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" i5                                           \
                 ", 0;\n"                                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LT_LISTS_##N \
                 "}, {%" i0 ", %" i1 ", %" i2 ", %" i3 "}, %" i4 ", p, 1, 1, 0;\n}"                \
                 : LT_OUTS_##N                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                             \
                   "r"(static_cast<int>(accumulate)));                                             \
  }
#define LT_WGMMA_TYPES(N, i0, i1, i2, i3, i4, i5)  \
  LT_WGMMA(Half, "f16", N, i0, i1, i2, i3, i4, i5) \
  LT_WGMMA(BFloat16, "bf16", N, i0, i1, i2, i3, i4, i5)

LT_WGMMA_TYPES(32, "16", "17", "18", "19", "20", "21")
LT_WGMMA_TYPES(64, "32", "33", "34", "35", "36", "37")
LT_WGMMA_TYPES(128, "64", "65", "66", "67", "68", "69")
LT_WGMMA_TYPES(256, "128", "129", "130", "131", "132", "133")

#undef LT_WGMMA_TYPES
#undef LT_WGMMA

}  // namespace llamatelemetry::ptx
