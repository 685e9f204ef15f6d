// append_kv_:   cache[slot_mapping[t]] = source[t]
// copy_blocks_: cache[dst] = cache[src] for every pair (src, dst)
// Both for K and V, both bound by bandwidth: a block moves one slot's row of both planes in units
// of kBytes, neighbouring threads neighbouring units. Grid: rows, at most kMaxBlocks, in strides.
#pragma once

#include <cstdint>

#include "cache/params.h"

namespace llamatelemetry {

constexpr int64_t kMaxBlocks = 1 << 20;

// The integer types of 1, 2, 4, 8 and 16 bytes: one load and one store each.
template <int kBytes>
struct CopyUnit;
template <>
struct CopyUnit<1> {
  using type = uint8_t;
};
template <>
struct CopyUnit<2> {
  using type = uint16_t;
};
template <>
struct CopyUnit<4> {
  using type = uint32_t;
};
template <>
struct CopyUnit<8> {
  using type = uint2;
};
template <>
struct CopyUnit<16> {
  using type = uint4;
};

template <int kBytes, int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
    append_kv_kernel(const __grid_constant__ AppendKvParams p) {
  using Unit = typename CopyUnit<kBytes>::type;
  const int64_t num_slots = p.num_blocks * p.page_size;
  const auto head_units = static_cast<int>(p.head_bytes / kBytes);
  const auto row_units = static_cast<int>(p.num_heads) * head_units;
  for (int64_t token = blockIdx.x; token < p.num_tokens; token += gridDim.x) {
    const int64_t slot = p.slot_mapping[token];
    if (slot < 0 || slot >= num_slots) continue;
    for (int i = threadIdx.x; i < 2 * row_units; i += kNumThreads) {
      const CachePlane& plane = p.planes[i / row_units];
      const int unit = i % row_units;
      const char* head = static_cast<const char*>(plane.source) + token * plane.token_stride_bytes +
                         unit / head_units * plane.head_stride_bytes;
      char* row = static_cast<char*>(plane.cache) + slot / p.page_size * plane.block_stride_bytes +
                  slot % p.page_size * plane.slot_stride_bytes;
      reinterpret_cast<Unit*>(row)[unit] = reinterpret_cast<const Unit*>(head)[unit % head_units];
    }
  }
}

template <int kBytes, int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
    copy_blocks_kernel(const __grid_constant__ MoveBlocksParams p) {
  using Unit = typename CopyUnit<kBytes>::type;
  const auto row_units = static_cast<int>(p.row_bytes / kBytes);
  for (int64_t item = blockIdx.x; item < p.num_pairs * p.page_size; item += gridDim.x) {
    const int64_t* pair = p.block_pairs + item / p.page_size * 2;
    const int64_t src = pair[0];
    const int64_t dst = pair[1];
    if (src < 0 || src >= p.num_blocks_from || dst < 0 || dst >= p.num_blocks_to || src == dst) {
      continue;
    }
    const int64_t slot = item % p.page_size;
    for (int i = threadIdx.x; i < 2 * row_units; i += kNumThreads) {
      const BlockPlane& plane = p.planes[i / row_units];
      const char* from = static_cast<const char*>(plane.from) +
                         src * plane.from_block_stride_bytes + slot * plane.from_slot_stride_bytes;
      char* to = static_cast<char*>(plane.to) + dst * plane.to_block_stride_bytes +
                 slot * plane.to_slot_stride_bytes;
      reinterpret_cast<Unit*>(to)[i % row_units] =
          reinterpret_cast<const Unit*>(from)[i % row_units];
    }
  }
}

}  // namespace llamatelemetry
