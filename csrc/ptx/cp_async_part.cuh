// Copies to shared memory of which a part exists, empty below the architecture they need.
// Sections of https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace llamatelemetry::ptx {

// #data-movement-and-conversion-instructions-cp-async, sm_80
// The first num_bytes of 16, of which alone any is read, and zeros behind them. Groups and waits:
// mma.cuh.
__device__ inline void cp_async_16_part(uint32_t shared_address, const void* global,
                                        int num_bytes) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address),
               "l"(__cvta_generic_to_global(global)), "r"(num_bytes)
               : "memory");
#endif
}

}  // namespace llamatelemetry::ptx
