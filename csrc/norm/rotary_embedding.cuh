// x[t, h, :rotary_dim] = x * cos[position] + rotate_half(x) * sin[position]      (Su et al. 2021)
// for the heads of q and k, in place. rotate_half gives (-x[i + half], x[i]) for halves and
// (-x[i + 1], x[i]) for interleaved pairs. Rounds each product to T, then the sum, as transformers
// does. Bound by latency or bandwidth: a thread turns one vector of pairs of one head.
// Grid [num_tokens, blocks a token], block kNumThreads.
#pragma once

#include "norm/params.h"
#include "tile/dependent_launch.cuh"
#include "tile/rotate.cuh"

namespace llamatelemetry {

template <typename V, int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
    rotary_embedding_kernel(const __grid_constant__ RotaryEmbeddingParams p) {
  using T = typename V::Element;
  const int64_t token = blockIdx.x;
  const auto half = static_cast<int>(p.rotary_dim / 2);
  const int units_per_head = half / V::kElements;
  const int unit = blockIdx.y * kNumThreads + threadIdx.x;
  const int64_t head = unit / units_per_head;
  let_successors_start();
  wait_for_predecessors();
  if (head >= p.q.num_heads + p.k.num_heads) return;

  int64_t position = token;
  if (p.positions) {
    position = p.positions_are_int64 ? static_cast<const int64_t*>(p.positions)[token]
                                     : static_cast<const int32_t*>(p.positions)[token];
  }
  const bool is_q = head < p.q.num_heads;
  const RotaryHeads& heads = is_q ? p.q : p.k;
  T* x = static_cast<T*>(heads.x) + token * heads.token_stride +
         (is_q ? head : head - p.q.num_heads) * heads.head_stride;
  const int pair = unit % units_per_head * V::kElements;
  const int i = p.interleaved ? 2 * pair : pair;
  const int j = p.interleaved ? i + 1 : i + half;
  V& first = *reinterpret_cast<V*>(x + i);
  V& second = *reinterpret_cast<V*>(x + j);
  if (position < 0 || position >= p.num_positions) {
    first = second = map_vector(V{}, [](float) { return NAN; });
    return;
  }
  const T* cos = static_cast<const T*>(p.cos) + position * p.cos_row_stride;
  const T* sin = static_cast<const T*>(p.sin) + position * p.sin_row_stride;
  const V a = first;
  const V b = second;
  first = rounded_sum_of_products(a, *reinterpret_cast<const V*>(cos + i), -1.0f, b,
                                  *reinterpret_cast<const V*>(sin + i));
  second = rounded_sum_of_products(b, *reinterpret_cast<const V*>(cos + j), 1.0f, a,
                                   *reinterpret_cast<const V*>(sin + j));
}

}  // namespace llamatelemetry
