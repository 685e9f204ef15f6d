// Every PTX instruction of the package, one per wrapper, empty below the architecture it needs.
// Sections of https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace llamatelemetry::ptx {

// #parallel-synchronization-and-communication-instructions-griddepcontrol, sm_90
// Until every grid this one depends on has completed and its writes are visible here.
__device__ inline void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Once each block has said so or ended, the grids that depend on this one may start.
__device__ inline void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// #data-movement-and-conversion-instructions-prefetch-prefetchu
// A hint only: reads no value, so it may come before what will be read is written.
__device__ inline void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}

// #floating-point-instructions-ex2
// 2^x to about 2^-22; 0 for -infinity.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// #floating-point-instructions-lg2
// log2(x) to about 2^-22, of the result where that is larger than 1; -infinity for 0 and what is
// smaller than normal numbers.
__device__ inline float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// #floating-point-instructions-rcp
// 1 / x to about 2^-23.
__device__ inline float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// #integer-arithmetic-instructions-bmsk
// The lowest count bits, all from 32 on.
__device__ inline uint32_t low_bits(uint32_t count) {
  uint32_t bits;
  asm("bmsk.clamp.b32 %0, 0, %1;" : "=r"(bits) : "r"(count));
  return bits;
}

}  // namespace llamatelemetry::ptx
