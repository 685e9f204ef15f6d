// The launch of cluster.cuh for a width and what keys are stored in.
#pragma once

#include "attention/decode/cluster.cuh"
#include "attention/launchers.h"
#include "common/per_device.h"
#include "tile/clusters.cuh"

namespace llamatelemetry::decode {

// How many clusters of 1, 2, 4, 8 and 16 blocks the current device runs at once. Asked once a
// device, after allowing the kernel its shared memory and clusters of 16.
constexpr int kClusterSizes = 5;
static_assert(1 << (kClusterSizes - 1) == kMaxClusterBlocks);
using DecodeClustersAtOnce = int[kClusterSizes];
template <typename Kernel>
const DecodeClustersAtOnce& decode_clusters_at_once() {
  static PerDevice<DecodeClustersAtOnce> at_once;
  return at_once.of_current([](DecodeClustersAtOnce& of_device) {
    const auto kernel = kernel_entry<Kernel>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::kSharedBytes);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    for (int i = 0; i < kClusterSizes; ++i) {
      of_device[i] = clusters_at_once<Kernel>(1 << i, Kernel::kSharedBytes);
    }
  });
}

// Most blocks of a cluster, a power of two up to `blocks`, with which all clusters run at once:
// where multiprocessors stand in smaller groups, large ones would wait for each other.
template <typename Kernel>
int blocks_that_run(int blocks, int clusters) {
  const DecodeClustersAtOnce& at_once = decode_clusters_at_once<Kernel>();
  unsigned i = 31 - static_cast<unsigned>(__builtin_clz(static_cast<unsigned>(blocks)));
  while (i > 0 && at_once[i] < clusters) --i;
  return 1 << i;
}

template <typename T, Config kConfig>
Error launch_cluster(const AttentionParams& p, Stream stream) {
  using Kernel = ClusterDecode<T, kConfig>;
  const int row_tiles = static_cast<int>((p.seqlen_q * p.group_size + kRowTile - 1) / kRowTile);
  const int heads = static_cast<int>(p.num_heads_kv);
  const int blocks = blocks_that_run<Kernel>(p.plan.cluster_blocks, heads * row_tiles);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(heads),
                  static_cast<unsigned>(row_tiles));
  return launch_clusters<Kernel>(blocks, grid, Kernel::kSharedBytes, stream, p);
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
