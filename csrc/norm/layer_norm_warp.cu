#include "norm/layer_norm_warp.cuh"

namespace llamatelemetry {

bool launch_layer_norm_warp(const LayerNormParams& p, Stream stream) {
  bool served = false;
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using V = WideVector<T>;
    if (!fits_wide_vectors<T>({p.x, p.weight, p.bias, p.out}, p.hidden_size, p.x_row_stride)) {
      return;
    }
    const int64_t held = (p.hidden_size / V::kElements + kWarpSize - 1) / kWarpSize;
    const dim3 grid(static_cast<unsigned>((p.num_tokens + kWarpRows - 1) / kWarpRows));
    served = IntMenu<1, 2, 3, 4, kMaxWarpVectors>::dispatch(held, [&](auto kHeld) {
      launch_overlapped(layer_norm_warp_kernel<V, kHeld()>, grid, kWarpRows * kWarpSize, stream, p);
    });
  });
  return served;
}

}  // namespace llamatelemetry
