// What packed weights need on their way from memory to a fragment, one PTX instruction a
// wrapper. Sections of https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace llamatelemetry::ptx {

// #data-movement-and-conversion-instructions-ld
// 8 bytes that are read once and that nothing writes meanwhile: they take no place in the L1 cache,
// and other accesses may move past the load.
__device__ inline uint2 load_streamed_8(const void* from) {
  uint2 value;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
               : "=r"(value.x), "=r"(value.y)
               : "l"(__cvta_generic_to_global(from)));
  return value;
}

// #logic-and-shift-instructions-lop3
// (x & mask) | bits: of two constants nvcc makes two instructions.
__device__ inline uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(x), "r"(mask), "r"(bits));
  return result;
}
// (x & mask) ^ bits
__device__ inline uint32_t and_xor(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(result) : "r"(x), "r"(mask), "r"(bits));
  return result;
}

}  // namespace llamatelemetry::ptx
