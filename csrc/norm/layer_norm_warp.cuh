// layer_norm of short rows: a warp takes one, so that nothing waits for other warps. Two passes
// over registers: the mean, then the sums of x - mean and of its square; no cancellation, wherever
// the mean is. A block has kWarpRows rows. Grid [num_tokens / kWarpRows], rounded up.
#pragma once

#include "norm/layer_norm.cuh"

namespace llamatelemetry {

constexpr int kWarpRows = 4;
constexpr int kMaxWarpVectors = 5;  // a lane's at most: with 7 the block's kernel is as fast

template <typename V, int kHeld>
__global__ void __launch_bounds__(kWarpRows* kWarpSize)
    layer_norm_warp_kernel(const __grid_constant__ LayerNormParams p) {
  using T = typename V::Element;
  const auto hidden_size = static_cast<int>(p.hidden_size);
  const int num_vectors = hidden_size / V::kElements;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t token = int64_t{blockIdx.x} * kWarpRows + threadIdx.x / kWarpSize;
  let_successors_start();
  prefetch_row<V>(p.weight, hidden_size);
  prefetch_row<V>(p.bias, hidden_size);
  const float per_size = reciprocal(static_cast<float>(hidden_size));
  wait_for_predecessors();
  if (token >= p.num_tokens) return;

  // Lane l has vectors l, l + 32, ...; all loads are under way before the first value is used.
  const auto for_each = [&](auto body) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int i = h * kWarpSize + lane;
      if (i < num_vectors) body(h, i);
    }
  };
  const auto load = [&](const void* row, int i, float otherwise) {
    return row ? static_cast<const V*>(row)[i] : filled<V>(otherwise);
  };
  const T* in = static_cast<const T*>(p.x) + token * p.x_row_stride;
  constexpr bool kEarly = kHeld < kMaxWarpVectors;  // weight and bias too, where registers hold all
  V x[kHeld];
  V weight[kEarly ? kHeld : 1];
  V bias[kEarly ? kHeld : 1];
  for_each([&](int h, int i) { x[h] = load(in, i, 0.0f); });
  if constexpr (kEarly) {
    for_each([&](int h, int i) { weight[h] = load(p.weight, i, 1.0f); });
    for_each([&](int h, int i) { bias[h] = load(p.bias, i, 0.0f); });
  }

  float sum = 0.0f;
  for_each([&](int h, int) { sum += sum_vector(x[h], [](float v) { return v; }); });
  // __fmul_rn: each distance must be from the same number, so none may fuse it.
  const float about = __fmul_rn(warp_reduce<Sum>(sum), per_size);
  float distances = 0.0f;
  float squares = 0.0f;
  for_each([&](int h, int) {
    distances += sum_vector(x[h], [&](float v) { return v - about; });
    squares += sum_vector(x[h], [&](float v) { return (v - about) * (v - about); });
  });
  const float off = warp_reduce<Sum>(distances) * per_size;  // what rounding cost the mean
  const float variance = fmaf(-off, off, warp_reduce<Sum>(squares) * per_size);
  const MeanRstd row{about + off, rsqrtf(variance + p.eps)};

  V* out = reinterpret_cast<V*>(static_cast<T*>(p.out) + token * p.hidden_size);
  for_each([&](int h, int i) {
    if constexpr (kEarly) {
      out[i] = normalized(x[h], row, weight[h], bias[h], p);
    } else {
      out[i] = normalized(x[h], row, load(p.weight, i, 1.0f), load(p.bias, i, 0.0f), p);
    }
  });
}

}  // namespace llamatelemetry
