// out = (exp(lse_a) out_a + exp(lse_b) out_b) / (exp(lse_a) + exp(lse_b)), in float, beside the
// larger lse; a part that saw no key (-inf) adds nothing. Bound by bandwidth. A warp a head of a
// token; grid: rows / kMergeWarps.
#pragma once

#include <cmath>

#include "attention/merge_params.h"
#include "common/device.h"
#include "tile/dependent_launch.cuh"
#include "tile/reduce.cuh"
#include "tile/vector.cuh"

namespace llamatelemetry {

constexpr int kMergeWarps = 4;

template <typename V>
__global__ void __launch_bounds__(kMergeWarps* kWarpSize)
    merge_attn_states_kernel(const __grid_constant__ MergeStatesParams p) {
  using T = typename V::Element;
  let_successors_start();
  wait_for_predecessors();
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * kMergeWarps + threadIdx.x / static_cast<int>(kWarpSize);
  if (row >= p.num_tokens * p.num_heads) return;
  const int64_t at = row % p.num_heads * p.num_tokens + row / p.num_heads;  // of lse
  const float lse_a = p.lse_a[at];
  const float lse_b = p.lse_b[at];
  const float largest = fmaxf(lse_a, lse_b);
  const float weight_a = lse_a == -INFINITY ? 0.0f : expf(lse_a - largest);
  const float weight_b = lse_b == -INFINITY ? 0.0f : expf(lse_b - largest);
  const float sum = weight_a + weight_b;
  const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
  const auto* a = reinterpret_cast<const V*>(static_cast<const T*>(p.out_a) + row * p.head_dim);
  const auto* b = reinterpret_cast<const V*>(static_cast<const T*>(p.out_b) + row * p.head_dim);
  auto* out = reinterpret_cast<V*>(static_cast<T*>(p.out) + row * p.head_dim);
  const int lane = threadIdx.x % static_cast<int>(kWarpSize);
  for (int i = lane; i < p.head_dim / V::kElements; i += kWarpSize) {
    out[i] = map_vector(a[i], b[i], [&](float x, float y) {
      const float of_a = weight_a == 0.0f ? 0.0f : weight_a * x;  // NaN of nothing is nothing
      const float of_b = weight_b == 0.0f ? 0.0f : weight_b * y;
      return (of_a + of_b) * scale;
    });
  }
  if (lane == 0) p.lse[at] = sum == 0.0f ? -INFINITY : largest + logf(sum);
}

}  // namespace llamatelemetry
