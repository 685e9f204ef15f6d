#include "sampling/sample.cuh"

namespace llamatelemetry {

using namespace sampling;

int64_t sample_workspace_bytes(int64_t vocab_size) { return row_workspace_bytes(vocab_size); }

Error launch_sample(const SampleParams& p, Stream stream) {
  const int64_t slices = num_slices(p.vocab_size);
  const dim3 grid(static_cast<unsigned>(p.batch * slices));
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (slices == 1) {
      launch_overlapped(sample_one_slice_kernel<T>, grid, kNumThreads, stream, p);
    } else {
      launch_overlapped(sample_maxima_kernel<T>, grid, kNumThreads, stream, p);
      launch_overlapped(sample_bins_kernel<T>, grid, kNumThreads, stream, p);
      launch_overlapped(sample_tokens_kernel<T>, grid, kNumThreads, stream, p);
    }
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
