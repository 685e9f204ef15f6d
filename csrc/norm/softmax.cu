#include "norm/softmax.cuh"

namespace llamatelemetry {

Error launch_softmax(const SoftmaxParams& p, Stream stream) {
  constexpr int kNumThreads = 256;
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    softmax_kernel<T, kNumThreads>
        <<<static_cast<unsigned>(p.num_rows), kNumThreads, 0, stream>>>(p);
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
