// Conversions, one PTX instruction a wrapper, empty below the architecture it needs.
// Sections of https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include <cstdint>

namespace llamatelemetry::ptx {

// #data-movement-and-conversion-instructions-cvt, sm_89
// The two e4m3 numbers in the low half of x, or in its high half, as two of float16.
__device__ inline uint32_t e4m3_to_half_low(uint32_t x) {
  uint32_t two = 0;
#if __CUDA_ARCH__ >= 890
  asm("{\n\t.reg .b16 low, high;\n\tmov.b32 {low, high}, %1;\n\t"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n\t}"
      : "=r"(two)
      : "r"(x));
#endif
  return two;
}
__device__ inline uint32_t e4m3_to_half_high(uint32_t x) {
  uint32_t two = 0;
#if __CUDA_ARCH__ >= 890
  asm("{\n\t.reg .b16 low, high;\n\tmov.b32 {low, high}, %1;\n\t"
      "cvt.rn.f16x2.e4m3x2 %0, high;\n\t}"
      : "=r"(two)
      : "r"(x));
#endif
  return two;
}

}  // namespace llamatelemetry::ptx
