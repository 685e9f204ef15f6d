#include "norm/layer_norm.cuh"

namespace llamatelemetry {

Error launch_layer_norm(const LayerNormParams& p, Stream stream) {
  constexpr int kNumThreads = 256;
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    layer_norm_kernel<T, kNumThreads>
        <<<static_cast<unsigned>(p.num_tokens), kNumThreads, 0, stream>>>(p);
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
