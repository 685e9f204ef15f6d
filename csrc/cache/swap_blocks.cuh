// swap_blocks_: to[dst] = from[src] for every pair (src, dst), for K and V, where one of the two
// caches may be pinned host memory: the GPU reads or writes it over the bus as it does its own, so
// that one launch moves any number of blocks, and a captured graph moves other pairs at replay.
// Bound by the bus. A few blocks keep it full, as each thread has kUnroll loads under way; the
// other multiprocessors are left to the stream that computes.
#pragma once

#include <cstdint>

#include "cache/cache.cuh"
#include "cache/params.h"

namespace llamatelemetry {

template <int kBytes, int kNumThreads, int kUnroll>
__global__ void __launch_bounds__(kNumThreads)
    swap_blocks_kernel(const __grid_constant__ MoveBlocksParams p) {
  using Unit = typename CopyUnit<kBytes>::type;
  const int64_t row_units = p.row_bytes / kBytes;
  const int64_t plane_units = p.page_size * row_units;
  const int64_t num_units = p.num_pairs * 2 * plane_units;  // in the order pair, plane, slot, unit
  constexpr int kChunk = kNumThreads * kUnroll;
  for (int64_t chunk = blockIdx.x; chunk * kChunk < num_units; chunk += gridDim.x) {
    Unit values[kUnroll];
    Unit* targets[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = chunk * kChunk + u * kNumThreads + threadIdx.x;
      targets[u] = nullptr;
      if (i >= num_units) continue;
      const int64_t* pair = p.block_pairs + i / (2 * plane_units) * 2;
      const int64_t src = pair[0];
      const int64_t dst = pair[1];
      if (src < 0 || src >= p.num_blocks_from || dst < 0 || dst >= p.num_blocks_to) continue;
      const BlockPlane& plane = p.planes[i / plane_units % 2];
      const int64_t slot = i % plane_units / row_units;
      const int64_t unit = i % row_units;
      const char* from = static_cast<const char*>(plane.from) +
                         src * plane.from_block_stride_bytes + slot * plane.from_slot_stride_bytes;
      char* to = static_cast<char*>(plane.to) + dst * plane.to_block_stride_bytes +
                 slot * plane.to_slot_stride_bytes;
      targets[u] = reinterpret_cast<Unit*>(to) + unit;
      values[u] = reinterpret_cast<const Unit*>(from)[unit];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (targets[u]) *targets[u] = values[u];
    }
  }
}

}  // namespace llamatelemetry
