// out[t, :] = (x[t, :] - mean) / sqrt(variance + eps) * (weight + offset) + bias (Ba et al. 2016)
// Pass 1: an approximate mean per warp. Pass 2, over registers: sums of x - mean and of its square.
// One exchange merges the warps' moments (Chan, Golub & LeVeque 1979): no cancellation, whatever
// the mean and wherever outliers are. Bandwidth bound, or for a few rows bound by latency. A block
// takes kRows rows; more than one where these are whole (block_row.cuh) and there are both weight
// and bias, which are then read once for them. Grid [num_tokens / kRows], rounded up.
#pragma once

#include "norm/block_row.cuh"
#include "norm/params.h"
#include "ptx/math.cuh"

namespace llamatelemetry {

// The values that a warp holds, as distances from a number near their mean.
struct alignas(16) WarpMoments {
  float count;
  float origin;
  float sum;      // of value - origin
  float squares;  // of the same
};

struct MeanRstd {
  float mean;
  float rstd;
};

// Of a row of which every warp has left its moments.
template <int kWarps>
__device__ __forceinline__ MeanRstd merge_moments(const WarpMoments (&warps)[kWarps], int lane,
                                                  float per_size, float eps) {
  WarpMoments warp{};  // every kWarps lanes have one of each warp
  if (lane % kWarps < blockDim.x / kWarpSize) warp = warps[lane % kWarps];
  const float about = warps[0].origin;
  float distance = warp.origin - about;
  const float all = warp_reduce<Sum, kWarps>(fmaf(warp.count, distance, warp.sum));
  const float mean = fmaf(all, per_size, about);
  // From the mean; nothing of it lost in rounding that.
  distance = fmaf(-all, per_size, distance);
  const float all_squares = warp_reduce<Sum, kWarps>(
      fmaf(distance, fmaf(warp.count, distance, 2.0f * warp.sum), warp.squares));
  return {mean, rsqrtf(fmaf(all_squares, per_size, eps))};
}

template <typename V>
__device__ __forceinline__ V normalized(const V& value, const MeanRstd& row, const V& w, const V& b,
                                        const LayerNormParams& p) {
  using T = typename V::Element;
  V result;
#pragma unroll
  for (int e = 0; e < V::kElements; ++e) {
    const float y = (to_float(value.value[e]) - row.mean) * row.rstd;
    const float factor = to_float(w.value[e]) + p.weight_offset;
    result.value[e] = from_float<T>(fmaf(y, factor, to_float(b.value[e])));
  }
  return result;
}

// 1 / size to the bit: the approximation and a Newton step.
__device__ __forceinline__ float reciprocal(float size) {
  const float about = ptx::reciprocal_approx(size);
  return fmaf(fmaf(-size, about, 1.0f), about, about);
}

// Of short rows, layer_norm_warp.cuh: false where it does not serve p.
bool launch_layer_norm_warp(const LayerNormParams& p, Stream stream);

template <typename V, int kHeld, int kRows>
__global__ void __launch_bounds__(BlockRow<V, kHeld, (kRows > 1)>::kWarps* kWarpSize)
    layer_norm_kernel(const __grid_constant__ LayerNormParams p) {
  using T = typename V::Element;
  using Row = BlockRow<V, kHeld, (kRows > 1)>;
  const auto hidden_size = static_cast<int>(p.hidden_size);
  // The last block goes back where a row is missing.
  const int64_t first = min(static_cast<int64_t>(blockIdx.x) * kRows, p.num_tokens - kRows);
  let_successors_start();
  prefetch_row<V>(p.weight, hidden_size);
  prefetch_row<V>(p.bias, hidden_size);
  const float per_size = reciprocal(static_cast<float>(hidden_size));
  const auto count = static_cast<float>(warp_row_size<V>(hidden_size));
  const float per_count = ptx::reciprocal_approx(count);
  wait_for_predecessors();

  const T* in = static_cast<const T*>(p.x) + first * p.x_row_stride;
  Row x[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) x[r] = Row(in + r * p.x_row_stride, hidden_size);
  // Under way before the mean is known.
  const WeightRow<V, kHeld> weight(p.weight, p.weight ? hidden_size : 0);
  const WeightRow<V, kHeld> bias(p.bias, p.bias ? hidden_size : 0);

  __shared__ WarpMoments s_moments[kRows][Row::kWarps];
  const int lane = threadIdx.x % kWarpSize;
  float sum[kRows] = {};
  float squares[kRows] = {};
  float origin[kRows];
  // Every thread takes the branch where there are several rows: it keeps ptxas 13.0 from summing
  // one before it has asked for the next.
  if (kRows == 1 || threadIdx.x < x[0].num_vectors) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      x[r].for_each([&](int, int, const V& value) {
        sum[r] += sum_vector(value, [](float v) { return v; });
      });
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    // __fmul_rn: each distance and the exchange must mean the same number, so none may fuse it.
    origin[r] = __fmul_rn(warp_reduce<Sum>(sum[r]), per_count);
    sum[r] = 0.0f;
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    x[r].for_each([&](int, int, const V& value) {
      sum[r] += sum_vector(value, [&](float v) { return v - origin[r]; });
      squares[r] += sum_vector(value, [&](float v) { return (v - origin[r]) * (v - origin[r]); });
    });
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const WarpMoments warp{count, origin[r], warp_reduce<Sum>(sum[r]),
                           warp_reduce<Sum>(squares[r])};
    if (lane == 0) s_moments[r][threadIdx.x / kWarpSize] = warp;
  }
  __syncthreads();
  MeanRstd row[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) row[r] = merge_moments(s_moments[r], lane, per_size, p.eps);

  T* out = static_cast<T*>(p.out) + first * p.hidden_size;
  V w;
  V b;
  const auto read_weights = [&](int i, int h) {
    w = kRows > 1 || p.weight ? weight.at(i, h) : filled<V>(1.0f);
    b = kRows > 1 || p.bias ? bias.at(i, h) : filled<V>(0.0f);
  };
  if constexpr (kRows > 1) read_weights(threadIdx.x, 0);
  x[0].for_each([&](int i, int h, const V&) {
    if constexpr (kRows == 1) read_weights(i, h);
    V result[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) result[r] = normalized(x[r].at(i, h), row[r], w, b, p);
    // The next before these results leave: a load does not pass a store.
    if (kRows > 1 && h + 1 < kHeld) read_weights(i + blockDim.x, h + 1);
#pragma unroll
    for (int r = 0; r < kRows; ++r) reinterpret_cast<V*>(out + r * p.hidden_size)[i] = result[r];
  });
}

}  // namespace llamatelemetry
