// Warpgroup matrix products of two operands in shared memory, either of which may lie along k or
// along its rows, and of bytes, which lie along k: sm_90a, for *_sm90.cu only. Fences, accumulators
// and descriptors are those of wgmma.cuh.
// Sections of https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "ptx/wgmma.cuh"
#include "ptx/wgmma_lists.cuh"

namespace llamatelemetry::ptx {

// No instruction: keeps the compiler from moving uses of an accumulator across this point.
template <int kSize>
__device__ inline void wgmma_hold(int (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// #asynchronous-warpgroup-level-matrix-instructions-wgmma-mma
// d[64, kN] = a[64, 16] * b[16, kN] (+ d where accumulate). kATrans, kBTrans: that operand is
// MN-major.
template <typename T, int kN, bool kATrans, bool kBTrans>
struct WgmmaMajors;
// d[64, kN] = a[64, 32] * b[32, kN] (+ d where accumulate) of int8, summed in int32.
template <int kN>
__device__ inline void wgmma_s8(int (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate);

// d[64, kN] = a[64, 32] * b[32, kN] (+ d where accumulate) of e4m3. Its sums keep some 14 bits.
template <int kN>
__device__ inline void wgmma_e4m3(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate);

// i0..i4: the operands after the N / 2 of d, as text.
#define LT_WGMMA(T, TYPE, N, i0, i1, i2, i3, i4)                                             \
  template <bool kATrans, bool kBTrans>                                                      \
  struct WgmmaMajors<T, N, kATrans, kBTrans> {                                               \
    static __device__ void add(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" i2                                   \
                   ", 0;\n"                                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE           \
                   " {" LT_LISTS_##N "}, %" i0 ", %" i1 ", p, 1, 1, %" i3 ", %" i4 ";\n}"    \
                   : LT_OUTS_##N                                                             \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)),                      \
                     "n"(static_cast<int>(kATrans)), "n"(static_cast<int>(kBTrans)));        \
    }                                                                                        \
  };
#define LT_WGMMA_TYPES(N, i0, i1, i2, i3, i4)  \
  LT_WGMMA(Half, "f16", N, i0, i1, i2, i3, i4) \
  LT_WGMMA(BFloat16, "bf16", N, i0, i1, i2, i3, i4)

LT_WGMMA_TYPES(64, "32", "33", "34", "35", "36")
LT_WGMMA_TYPES(128, "64", "65", "66", "67", "68")
LT_WGMMA_TYPES(256, "128", "129", "130", "131", "132")

#undef LT_WGMMA_TYPES
#undef LT_WGMMA

#define LT_WGMMA_E4M3(N, i0, i1, i2)                                                       \
  template <>                                                                              \
  __device__ inline void wgmma_e4m3<N>(float (&d)[N / 2], uint64_t a, uint64_t b,          \
                                       bool accumulate) {                                  \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" i2                                   \
                 ", 0;\n"                                                                  \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" LT_LISTS_##N \
                 "}, %" i0 ", %" i1 ", p, 1, 1;\n}"                                        \
                 : LT_OUTS_##N                                                             \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                     \
  }
LT_WGMMA_E4M3(64, "32", "33", "34")
LT_WGMMA_E4M3(128, "64", "65", "66")
#undef LT_WGMMA_E4M3

// From here on accumulators are int32: the lists of operands take this macro where they are used.
#undef LT_OUT
#define LT_OUT(i)                                                                                 \
  "+r"(d[8 * i]), "+r"(d[8 * i + 1]), "+r"(d[8 * i + 2]), "+r"(d[8 * i + 3]), "+r"(d[8 * i + 4]), \
      "+r"(d[8 * i + 5]), "+r"(d[8 * i + 6]), "+r"(d[8 * i + 7])
#define LT_WGMMA_S8(N, i0, i1, i2)                                                               \
  template <>                                                                                    \
  __device__ inline void wgmma_s8<N>(int (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" i2                                         \
                 ", 0;\n"                                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 {" LT_LISTS_##N           \
                 "}, %" i0 ", %" i1 ", p;\n}"                                                    \
                 : LT_OUTS_##N                                                                   \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                           \
  }
LT_WGMMA_S8(64, "32", "33", "34")
LT_WGMMA_S8(128, "64", "65", "66")
LT_WGMMA_S8(256, "128", "129", "130")
#undef LT_WGMMA_S8
#undef LT_OUT

}  // namespace llamatelemetry::ptx
