#include "attention/merge_states.cuh"

namespace llamatelemetry {

Error launch_merge_attn_states(const MergeStatesParams& p, Stream stream) {
  const int64_t num_rows = p.num_tokens * p.num_heads;
  const auto grid = dim3(static_cast<unsigned>((num_rows - 1) / kMergeWarps + 1));
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = [&](auto vector) {
      launch_overlapped(merge_attn_states_kernel<typename decltype(vector)::type>, grid,
                        kMergeWarps * kWarpSize, stream, p);
    };
    if (fits_wide_vectors<T>({p.out_a, p.out_b, p.out}, p.head_dim)) {
      run(Type<WideVector<T>>{});
    } else {
      run(Type<Vector<T, 1>>{});
    }
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
