// Scalar arithmetic and bits, one PTX instruction a wrapper, empty below the architecture it needs.
// Sections of https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace llamatelemetry::ptx {

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
