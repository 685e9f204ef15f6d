#include "attention/paged_attention.cuh"
#include "attention/params.h"

namespace llamatelemetry {

Error launch_paged_attention(const PagedAttentionParams& p, Stream stream) {
  constexpr int kNumWarps = 8;
  const int64_t num_heads_q = p.num_heads_kv * p.group_size;
  if (num_heads_q > 65535) return "num_heads_q must be at most 65535";
  const dim3 grid(p.total_q, num_heads_q);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    paged_attention_kernel<T, kNumWarps><<<grid, kNumWarps * kWarpSize, 0, stream>>>(p);
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
