// Programmatic dependent launch and the prefetch before its wait, one PTX instruction a wrapper,
// empty below the architecture it needs. Sections of
// https://docs.nvidia.com/cuda/parallel-thread-execution/
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

}  // namespace llamatelemetry::ptx
