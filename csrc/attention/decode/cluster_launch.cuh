// The launch of cluster.cuh for a width and what keys are stored in.
#pragma once

#include <array>
#include <mutex>

#include "attention/decode/cluster.cuh"
#include "attention/launchers.h"
#include "common/device.h"
#include "tile/kernel_entry.cuh"

namespace llamatelemetry::decode {

// How many clusters of 1, 2, 4, 8 and 16 blocks the current device runs at
// once; once a device, as is what allows their shared memory and sizes.
template <typename Kernel>
const auto& clusters_at_once() {
  constexpr int kMaxDevices = 64, kSizes = 5;
  static_assert(1 << (kSizes - 1) == kMaxClusterBlocks);
  static std::array<int, kSizes> most[kMaxDevices];
  static std::once_flag asked[kMaxDevices];
  int device = 0;
  cudaGetDevice(&device);
  std::call_once(asked[device], [&] {
    const auto kernel = kernel_entry<Kernel>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::kSharedBytes);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    for (unsigned i = 0; i < kSizes; ++i) {
      cudaLaunchAttribute cluster{};
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {1u << i, 1, 1};
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(1u << i);
      config.blockDim = dim3(Kernel::kNumThreads);
      config.dynamicSmemBytes = Kernel::kSharedBytes;
      config.attrs = &cluster;
      config.numAttrs = 1;
      if (cudaOccupancyMaxActiveClusters(&most[device][i], kernel, &config) != cudaSuccess) {
        cudaGetLastError();
        most[device][i] = 0;
      }
    }
  });
  return most[device];
}

// Most blocks of a cluster, a power of two up to `blocks`, with which all
// clusters run at once: where multiprocessors stand in smaller groups, large
// ones would wait for each other.
template <typename Kernel>
int blocks_that_run(int blocks, int clusters) {
  const auto& most = clusters_at_once<Kernel>();
  unsigned i = 31 - static_cast<unsigned>(__builtin_clz(static_cast<unsigned>(blocks)));
  while (i > 0 && most[i] < clusters) --i;
  return 1 << i;
}

template <typename T, Config kConfig>
Error launch_cluster(const AttentionParams& p, Stream stream) {
  using Kernel = ClusterDecode<T, kConfig>;
  const int row_tiles = static_cast<int>((p.seqlen_q * p.group_size + kRowTile - 1) / kRowTile);
  const int heads = static_cast<int>(p.num_heads_kv);
  const auto blocks =
      static_cast<unsigned>(blocks_that_run<Kernel>(p.plan.cluster_blocks, heads * row_tiles));
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {blocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks, static_cast<unsigned>(heads), static_cast<unsigned>(row_tiles));
  config.blockDim = dim3(Kernel::kNumThreads);
  config.dynamicSmemBytes = Kernel::kSharedBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  cudaLaunchKernelEx(&config, kernel_entry<Kernel>, p);
  return last_launch_error();
}

template <Config kConfig>
Error launch_cluster(const AttentionParams& p, Stream stream) {
  return p.dtype == DType::kFloat16 ? launch_cluster<Half, kConfig>(p, stream)
                                    : launch_cluster<BFloat16, kConfig>(p, stream);
}

// kTable: the configurations of a storage of 8 bits.
template <const Config (&kTable)[4]>
Error launch_cluster_8_bit(const AttentionParams& p, Stream stream) {
  if (p.head_dim <= 64) return launch_cluster<kTable[0]>(p, stream);
  if (p.head_dim <= 128) return launch_cluster<kTable[1]>(p, stream);
  if (p.head_dim <= 192) return launch_cluster<kTable[2]>(p, stream);
  return launch_cluster<kTable[3]>(p, stream);
}

}  // namespace llamatelemetry::decode
