#include "norm/params.h"
#include "norm/rms_norm.cuh"

namespace llamatelemetry {

Error launch_rms_norm(const RmsNormParams& p, Stream stream) {
  constexpr int kNumThreads = 256;
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    rms_norm_kernel<T, kNumThreads><<<p.num_tokens, kNumThreads, 0, stream>>>(
        static_cast<const T*>(p.x), static_cast<const T*>(p.weight), static_cast<T*>(p.out),
        p.x_row_stride, static_cast<int>(p.hidden_size), p.eps);
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
