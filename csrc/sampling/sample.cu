#include "sampling/sample.cuh"

namespace llamatelemetry {

Error launch_sample(const SampleParams& p, Stream stream) {
  constexpr int kNumThreads = 1024;  // few rows: each needs all the latency hiding it can get
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    sample_kernel<T, kNumThreads><<<p.batch, kNumThreads, 0, stream>>>(p);
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
