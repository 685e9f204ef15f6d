#include "norm/rms_norm.cuh"

namespace llamatelemetry {

Error launch_rms_norm(const RmsNormParams& p, Stream stream) {
  constexpr int kNumThreads = 256;
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    rms_norm_kernel<T, kNumThreads>
        <<<static_cast<unsigned>(p.num_tokens), kNumThreads, 0, stream>>>(p);
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
