// Kernels of one stream that overlap their starts (programmatic dependent launch, sm_90): a chain
// of small ones then pays for the dependency, not for the launch.
//
// The rule that makes it safe: a kernel launched by launch_overlapped calls wait_for_predecessors
// in every thread before it touches memory. It may then have started before the kernel ahead has
// ended, but it ends after it, so whatever waits for it waits for all before it. Earlier may come
// its own parameters, prefetches to L2, and past L1 what says no more than what to prefetch.
#pragma once

#include <type_traits>

#include "common/backend.h"
#include "common/device.h"
#include "ptx/dependent_launch.cuh"

namespace llamatelemetry {

// First thing in most kernels: the next one may take the places that are free.
__device__ inline void let_successors_start() { ptx::griddepcontrol_launch_dependents(); }

__device__ inline void wait_for_predecessors() { ptx::griddepcontrol_wait(); }

template <typename Params>
void launch_overlapped(void (*kernel)(Params), dim3 grid, unsigned num_threads, Stream stream,
                       const std::type_identity_t<Params>& params, size_t shared_bytes = 0) {
  const DeviceFacts& device = current_device();
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(num_threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  // Code for older GPUs has no wait in it, so it must not start early on a newer one either.
  config.numAttrs = device.capability >= 90 && device.code_capability >= 90;
  cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace llamatelemetry
