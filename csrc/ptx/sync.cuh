// Loads and stores that order what blocks of a grid leave for each other in memory.
// Sections of https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include <cstdint>

namespace llamatelemetry::ptx {

// #data-movement-and-conversion-instructions-st, sm_70
// Whoever sees the value sees all that this thread, and whoever it has synchronised with, wrote
// before.
__device__ inline void store_release(uint64_t* to, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "l"(value)
               : "memory");
}
// #data-movement-and-conversion-instructions-ld, sm_70
__device__ inline uint64_t load_acquire(const uint64_t* from) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];"
               : "=l"(value)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return value;
}

}  // namespace llamatelemetry::ptx
