// Bulk copies of matrices and of runs of bytes: sm_90a, for *_sm90.cu only. Their barriers:
// tma.cuh. Sections of https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace llamatelemetry::ptx {

// #data-movement-and-conversion-instructions-cp-async-bulk-tensor
// The box of a 2-dimensional map at c0, c1 into shared memory.
__device__ inline void tma_load_2d(uint32_t to, const CUtensorMap* map, uint32_t barrier, int c0,
                                   int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1)
      : "memory");
}
// #data-movement-and-conversion-instructions-cp-async-bulk
// num_bytes, a multiple of 16, from global to shared memory.
__device__ inline void bulk_load(uint32_t to, const void* from, uint32_t num_bytes,
                                 uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(__cvta_generic_to_global(from)), "r"(num_bytes), "r"(barrier)
      : "memory");
}

}  // namespace llamatelemetry::ptx
