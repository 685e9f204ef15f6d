// Grids whose blocks form clusters: how many of those run at once, and the launch.
#pragma once

#include "common/backend.h"
#include "common/device.h"
#include "tile/kernel_entry.cuh"

namespace llamatelemetry {

// Clusters of so many blocks, which lie side by side along the grid's x.
inline cudaLaunchAttribute cluster_attribute(int blocks) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  return attribute;
}

// How many clusters of so many blocks of Kernel the current device runs at once, 0 if none. Its
// multiprocessors stand in groups, and a cluster lies in one: fewer may run than there is room for.
// The kernel must have been allowed the shared memory, and more than 8 blocks.
template <typename Kernel>
int clusters_at_once(int blocks, int shared_bytes) {
  cudaLaunchAttribute attribute = cluster_attribute(blocks);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(Kernel::kNumThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, kernel_entry<Kernel>, &config) == cudaSuccess) {
    return count;
  }
  cudaGetLastError();  // so that the next launch does not report it
  return 0;
}

// As launch_overlapped, whose rule Kernel keeps (tile/dependent_launch.cuh), in clusters of so many
// blocks; 0: without clusters.
template <typename Kernel>
Error launch_clusters(int blocks, dim3 grid, int shared_bytes, Stream stream,
                      const typename Kernel::Params& params) {
  const DeviceFacts& device = current_device();
  cudaLaunchAttribute attributes[2] = {{}, cluster_attribute(blocks)};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(Kernel::kNumThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  // Code for older GPUs has no wait in it: it must not start early on a newer one either, and it
  // has no clusters.
  config.numAttrs = device.capability < 90 || device.code_capability < 90 ? 0 : blocks > 0 ? 2 : 1;
  cudaLaunchKernelEx(&config, kernel_entry<Kernel>, params);
  return last_launch_error();
}

}  // namespace llamatelemetry
