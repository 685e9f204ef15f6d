// Matrix instructions of a warp over int8, summed in int32, one instruction per wrapper, empty
// below the architecture it needs.
// Sections of https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include <cstdint>

namespace llamatelemetry::ptx {

// #warp-level-matrix-instructions-mma, m16n8k32, sm_80
// d += a * b. a is 16 x 32 by rows, b 32 x 8 by columns: a register holds four of k, so fragments
// are those of mma.m16n8k16 with two bytes an element.
__device__ inline void mma_m16n8k32(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// As above, m8n8k16, sm_75: a is 8 x 16, b 16 x 8.
__device__ inline void mma_m8n8k16(int& d0, int& d1, uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 750
  asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+r"(d0), "+r"(d1)
      : "r"(a), "r"(b));
#endif
}

}  // namespace llamatelemetry::ptx
