// Loads from global memory with a word on caching, and stores of several registers, one PTX
// instruction a wrapper.
// Sections of https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace llamatelemetry::ptx {

// #data-movement-and-conversion-instructions-ld
// 16 bytes that are read once: they take no place in the L1 cache.
__device__ inline uint4 load_streamed(const void* from) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return value;
}

// #data-movement-and-conversion-instructions-st
// To a multiple of 8 or 16 bytes, in one store: of a struct nvcc may make one for each member.
__device__ inline void store(void* to, uint2 value) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(value.x), "r"(value.y)
               : "memory");
}
__device__ inline void store(void* to, float4 value) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "f"(value.x), "f"(value.y), "f"(value.z),
                 "f"(value.w)
               : "memory");
}

}  // namespace llamatelemetry::ptx
