// Bulk tensor copies of three dimensions: sm_90a, for *_sm90.cu only. Their barriers: tma.cuh.
// Sections of https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace llamatelemetry::ptx {

// #data-movement-and-conversion-instructions-cp-async-bulk-tensor
// The box of a 3-dimensional map at c0..c2 into shared memory.
__device__ inline void tma_load_3d(uint32_t to, const CUtensorMap* map, uint32_t barrier, int c0,
                                   int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

}  // namespace llamatelemetry::ptx
