// Prefetches to L2 of many bytes at once, empty below the architecture that they need. Sections of
// https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace llamatelemetry::ptx {

// #data-movement-and-conversion-instructions-cp-async-bulk-prefetch, sm_90
// A hint only, as prefetch_l2: num_bytes, a multiple of 16, from p, which is at one.
__device__ inline void prefetch_bulk_l2(const void* p, uint32_t num_bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(p)),
               "r"(num_bytes));
#endif
}

}  // namespace llamatelemetry::ptx
