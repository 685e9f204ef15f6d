// cache[slot_mapping[t]] = round(source[t] / scale) for each head of K and V, in float8_e4m3 or
// int8. Bound by latency or bandwidth: a warp a head of a token, its row in registers. Grid: warps
// over tokens, K and V, and their heads, block kNumWarps * 32.
#pragma once

#include "cache/eight_bit.cuh"
#include "cache/params.h"
#include "tile/convert.cuh"

namespace llamatelemetry {

template <typename T, int kNumWarps>
__global__ void __launch_bounds__(kNumWarps* kWarpSize)
    append_8_bit_kernel(const __grid_constant__ AppendKvParams p) {
  constexpr int kElements = kMax8BitHeadDim / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t item = int64_t{blockIdx.x} * kNumWarps + threadIdx.x / kWarpSize;
  const int64_t token = item / (2 * p.num_heads);
  if (token >= p.num_tokens) return;
  const int64_t slot = p.slot_mapping[token];
  if (slot < 0 || slot >= p.num_blocks * p.page_size) return;
  const auto which = static_cast<int>(item / p.num_heads % 2);
  const int64_t head = item % p.num_heads;
  const CachePlane& plane = p.planes[which];
  const auto* source =
      reinterpret_cast<const T*>(static_cast<const char*>(plane.source) +
                                 token * plane.token_stride_bytes + head * plane.head_stride_bytes);
  const auto head_dim = static_cast<int>(p.head_bytes);
  float x[kElements];
  float largest = 0.0f;
  bool is_finite = true;
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    const int at = e * kWarpSize + lane;
    x[e] = at < head_dim ? to_float(source[at]) : 0.0f;
    is_finite &= isfinite(x[e]);
    largest = fmaxf(largest, fabsf(x[e]));
  }
  const float factor =
      factor_of_row(p.scales[which], p.page_size, slot, head, p.stored, largest, is_finite);
  auto* to = static_cast<uint8_t*>(plane.cache) + slot / p.page_size * plane.block_stride_bytes +
             slot % p.page_size * plane.slot_stride_bytes + head * head_dim;
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    const int at = e * kWarpSize + lane;
    if (at < head_dim) to[at] = stored_in_8_bits(x[e] * factor, p.stored);
  }
}

}  // namespace llamatelemetry
