// out = sum_i exp(lse_i - lse) out_i, lse = log(sum_i exp(lse_i)) over the parts of the keys that
// tiles were cut into. Bound by latency: parts come from L2. Grid: threads over vectors of rows.
#pragma once

#include "attention/schedule.cuh"
#include "attention/sm90/params.h"
#include "tile/dependent_launch.cuh"
#include "tile/vector.cuh"

namespace llamatelemetry {

constexpr int kPartThreads = 128;

template <typename T>
static __global__ void __launch_bounds__(kPartThreads)
    add_parts_kernel(const __grid_constant__ AttentionParams p) {
  using V = WideVector<T>;
  let_successors_start();
  wait_for_predecessors();
  const int64_t row_vectors = p.head_dim / V::kElements;
  const int64_t num_rows = p.total_q * p.num_heads_q;
  const int64_t item = int64_t{blockIdx.x} * kPartThreads + threadIdx.x;
  if (item >= num_rows * row_vectors) return;
  const int64_t row = item / row_vectors;  // (token, head)
  const int64_t token = row / p.num_heads_q, head = row % p.num_heads_q;
  const bool packed = p.cu_seqlens_q != nullptr;
  if (packed && token >= p.cu_seqlens_q[p.batch]) return;  // in no sequence: never written
  if (p.served != nullptr) {
    const int64_t index = sequence_of_token(p.cu_seqlens_q, p.batch, token);
    if (sequence_span(p, index).num_queries == 0) return;  // another kernel's
  }
  const int64_t at =
      packed ? head * p.total_q + token
             : (token / p.seqlen_q * p.num_heads_q + head) * p.seqlen_q + token % p.seqlen_q;
  float largest = -INFINITY;
  for (int i = 0; i < p.plan.num_splits; ++i) {
    largest = fmaxf(largest, p.partial_stats[i * num_rows + at]);
  }
  const float base = largest == -INFINITY ? 0.0f : largest;
  float sum = 0.0f;
  float o[V::kElements] = {};
  for (int i = 0; i < p.plan.num_splits; ++i) {
    const float weight = expf(p.partial_stats[i * num_rows + at] - base);
    const float* part =
        p.partial_out + (i * num_rows + row) * p.head_dim + item % row_vectors * V::kElements;
    sum += weight;
#pragma unroll
    for (int e = 0; e < V::kElements; e += 4) {
      const float4 four = *reinterpret_cast<const float4*>(part + e);
      o[e] += weight * four.x;
      o[e + 1] += weight * four.y;
      o[e + 2] += weight * four.z;
      o[e + 3] += weight * four.w;
    }
  }
  const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
  V out;
#pragma unroll
  for (int e = 0; e < V::kElements; ++e) out.value[e] = from_float<T>(o[e] * factor);
  static_cast<V*>(p.out)[row * row_vectors + item % row_vectors] = out;
  if (item % row_vectors == 0) p.lse[at] = sum == 0.0f ? -INFINITY : base + logf(sum);
}

inline Error launch_add_parts(const AttentionParams& p, Stream stream) {
  const int64_t items = p.total_q * p.num_heads_q * p.head_dim / WideVector<Half>::kElements;
  const dim3 grid(static_cast<unsigned>((items + kPartThreads - 1) / kPartThreads));
  launch_overlapped(
      p.dtype == DType::kFloat16 ? add_parts_kernel<Half> : add_parts_kernel<BFloat16>, grid,
      kPartThreads, stream, p);
  return last_launch_error();
}

}  // namespace llamatelemetry
