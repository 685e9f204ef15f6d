// out[t, :] = (x[t, :] - mean) / sqrt(variance + eps) * weight + bias       (Ba et al. 2016)
// Each warp takes about the mean of what it holds, then sums the distances from it and their
// squares in a second pass over registers; one exchange between the warps makes the row's mean and
// variance of these (Chan, Golub & LeVeque 1979). No cancellation, whatever the mean and wherever
// outliers are. Bandwidth bound, or for a few rows bound by latency: one block per row. Grid
// [num_tokens].
#pragma once

#include "norm/block_row.cuh"
#include "norm/params.h"

namespace llamatelemetry {

// The values that a warp holds, as distances from a number near their mean.
struct alignas(16) WarpMoments {
  float count;
  float origin;
  float sum;      // of value - origin
  float squares;  // of the same
};

template <typename V, int kHeld>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    layer_norm_kernel(const __grid_constant__ LayerNormParams p) {
  using T = typename V::Element;
  const int64_t token = blockIdx.x;
  const auto hidden_size = static_cast<int>(p.hidden_size);
  let_successors_start();
  prefetch_row<V>(p.weight, hidden_size);
  prefetch_row<V>(p.bias, hidden_size);
  const auto size = static_cast<float>(hidden_size);
  float per_size = ptx::reciprocal_approx(size);
  per_size = fmaf(fmaf(-size, per_size, 1.0f), per_size, per_size);  // a Newton step: to the bit
  const auto count = static_cast<float>(warp_row_size<V>(hidden_size));
  const float per_count = ptx::reciprocal_approx(count);
  wait_for_predecessors();

  BlockRow<V, kHeld> x(static_cast<const T*>(p.x) + token * p.x_row_stride, hidden_size);
  // Under way before the mean is known.
  const BlockRow<V, kHeldWeights<kHeld>> weight(p.weight, p.weight ? hidden_size : 0);
  const BlockRow<V, kHeldWeights<kHeld>> bias(p.bias, p.bias ? hidden_size : 0);

  float sum = 0.0f;
  x.for_each(
      [&](int, int, const V& value) { sum += sum_vector(value, [](float v) { return v; }); });
  // __fmul_rn: each distance and the exchange must mean the same number, so none may fuse it.
  const float origin = __fmul_rn(warp_reduce<Sum>(sum), per_count);
  sum = 0.0f;
  float squares = 0.0f;
  x.for_each([&](int, int, const V& value) {
    sum += sum_vector(value, [=](float v) { return v - origin; });
    squares += sum_vector(value, [=](float v) { return (v - origin) * (v - origin); });
  });
  sum = warp_reduce<Sum>(sum);
  squares = warp_reduce<Sum>(squares);

  __shared__ WarpMoments s_moments[x.kWarps];
  const int lane = threadIdx.x % kWarpSize;
  if (lane == 0) s_moments[threadIdx.x / kWarpSize] = {count, origin, sum, squares};
  __syncthreads();
  WarpMoments warp{};  // every kWarps lanes have one of each warp
  if (lane % x.kWarps < blockDim.x / kWarpSize) warp = s_moments[lane % x.kWarps];
  const float first = s_moments[0].origin;
  float distance = warp.origin - first;
  sum = warp_reduce<Sum, x.kWarps>(fmaf(warp.count, distance, warp.sum));
  const float mean = fmaf(sum, per_size, first);
  distance = fmaf(-sum, per_size, distance);  // from the mean; nothing of it lost in rounding that
  squares = warp_reduce<Sum, x.kWarps>(
      fmaf(distance, fmaf(warp.count, distance, 2.0f * warp.sum), warp.squares));
  const float rstd = rsqrtf(fmaf(squares, per_size, p.eps));

  V* out = reinterpret_cast<V*>(static_cast<T*>(p.out) + token * p.hidden_size);
  x.for_each([&](int i, int h, const V& value) {
    float y[V::kElements];
#pragma unroll
    for (int e = 0; e < V::kElements; ++e) y[e] = (to_float(value.value[e]) - mean) * rstd;
    if (p.weight) {
      const V w = weight.at(i, h);
#pragma unroll
      for (int e = 0; e < V::kElements; ++e) y[e] *= to_float(w.value[e]);
    }
    if (p.bias) {
      const V b = bias.at(i, h);
#pragma unroll
      for (int e = 0; e < V::kElements; ++e) y[e] += to_float(b.value[e]);
    }
    V result;
#pragma unroll
    for (int e = 0; e < V::kElements; ++e) result.value[e] = from_float<T>(y[e]);
    out[i] = result;
  });
}

}  // namespace llamatelemetry
