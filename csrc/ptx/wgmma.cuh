// Warpgroup matrix products: sm_90a, for *_sm90.cu only. Accumulators are float32 [64, N]: element
// 4 * j + 2 * h + e of a thread is row 16 * warp + lane / 4 + 8 * h, column 8 * j + 2 * (lane % 4)
// + e. Sections of https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "ptx/wgmma_lists.cuh"

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

}  // namespace llamatelemetry::ptx
