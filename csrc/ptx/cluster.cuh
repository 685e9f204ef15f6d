// Blocks of a cluster, which read each other's shared memory: sm_90.
// Sections of https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace llamatelemetry::ptx {

// #parallel-synchronization-and-communication-instructions-barrier-cluster
// Every thread of every block of the cluster; what they wrote before is visible after.
__device__ inline void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The same in two steps, of which the first shows nobody what was written before: for a word that
// all blocks have started.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// #data-movement-and-conversion-instructions-mapa
// Where an address of this block's shared memory lies in that of the block of rank.
__device__ inline uint32_t cluster_address(uint32_t shared_address, uint32_t rank) {
  uint32_t address = shared_address;
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(shared_address), "r"(rank));
#endif
  return address;
}

// #data-movement-and-conversion-instructions-ld
__device__ inline float4 load_cluster(uint32_t cluster_address) {
  float4 value{};
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(cluster_address)
               : "memory");
#endif
  return value;
}
// #data-movement-and-conversion-instructions-st-async
// Pushes what the mbarrier beside it, of the same block, counts: both addresses of cluster_address.
__device__ inline void push_cluster(uint32_t cluster_address, const float4& value,
                                    uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
      "[%0], {%1, %2, %3, %4}, [%5];" ::"r"(cluster_address),
      "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(barrier)
      : "memory");
#endif
}
__device__ inline void push_cluster(uint32_t cluster_address, const float2& value,
                                    uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 "
      "[%0], {%1, %2}, [%3];" ::"r"(cluster_address),
      "f"(value.x), "f"(value.y), "r"(barrier)
      : "memory");
#endif
}

// #data-movement-and-conversion-instructions-cp-async-bulk
// num_bytes of this block's shared memory, a multiple of 16, to where `to` lies, which the mbarrier
// beside it counts: both of cluster_address. This block must stay until they are there.
__device__ inline void copy_to_cluster(uint32_t to, uint32_t from, uint32_t num_bytes,
                                       uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(to),
      "r"(from), "r"(num_bytes), "r"(barrier)
      : "memory");
#endif
}

}  // namespace llamatelemetry::ptx
