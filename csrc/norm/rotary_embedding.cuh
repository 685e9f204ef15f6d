// x[t, h, :rotary_dim] = x * cos[position] + rotate_half(x) * sin[position]      (Su et al. 2021)
// for the heads of q and k, in place. rotate_half gives (-x[i + half], x[i]) for halves and
// (-x[i + 1], x[i]) for interleaved pairs. Rounds each product to T, then the sum, as transformers
// does. A thread turns one pair of one head. Grid [num_tokens], block kNumThreads.
#pragma once

#include <cstdint>

#include "norm/params.h"
#include "tile/convert.cuh"

namespace llamatelemetry {

// a * b + c * d as three operations on Ts.
template <typename T>
__device__ inline T rounded_sum_of_products(float a, T b, float c, T d) {
  const T ab = from_float<T>(__fmul_rn(a, to_float(b)));
  const T cd = from_float<T>(__fmul_rn(c, to_float(d)));
  return from_float<T>(to_float(ab) + to_float(cd));
}

template <typename T, int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
    rotary_embedding_kernel(const __grid_constant__ RotaryEmbeddingParams p) {
  const int64_t token = blockIdx.x;
  int64_t position = token;
  if (p.positions) {
    position = p.positions_are_int64 ? static_cast<const int64_t*>(p.positions)[token]
                                     : static_cast<const int32_t*>(p.positions)[token];
  }
  const bool known = position >= 0 && position < p.num_positions;
  const T* cos = static_cast<const T*>(p.cos) + position * p.cos_row_stride;
  const T* sin = static_cast<const T*>(p.sin) + position * p.sin_row_stride;
  const auto half = static_cast<int>(p.rotary_dim / 2);
  const auto num_pairs = static_cast<int>(p.q.num_heads + p.k.num_heads) * half;
  for (int pair = threadIdx.x; pair < num_pairs; pair += kNumThreads) {
    const int64_t head = pair / half;
    const bool is_q = head < p.q.num_heads;
    const RotaryHeads& heads = is_q ? p.q : p.k;
    T* x = static_cast<T*>(heads.x) + token * heads.token_stride +
           (is_q ? head : head - p.q.num_heads) * heads.head_stride;
    const int i = p.interleaved ? pair % half * 2 : pair % half;
    const int j = p.interleaved ? i + 1 : i + half;
    if (!known) {
      x[i] = x[j] = from_float<T>(NAN);
      continue;
    }
    const float a = to_float(x[i]);
    const float b = to_float(x[j]);
    x[i] = rounded_sum_of_products(a, cos[i], -b, sin[i]);
    x[j] = rounded_sum_of_products(b, cos[j], a, sin[j]);
  }
}

}  // namespace llamatelemetry
