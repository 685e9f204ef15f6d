#include "gemm/dense_weights.cuh"

#include "gemm/params.h"

namespace llamatelemetry {

Error launch_dense_weights(const DenseWeightsParams& p, Stream stream) {
  constexpr int kNumThreads = 256;
  dispatch_format(p.format, [&](auto format) {
    dispatch_dtype(p.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      using Word = PackedWord<format(), 4>;
      const int64_t num_tiles = (p.n + kTileRows - 1) / kTileRows;
      const int64_t num_threads = num_tiles * (p.k / Word::kBlockSize) * Word::kWordsPerBlock * 4;
      const auto grid = static_cast<unsigned>((num_threads + kNumThreads - 1) / kNumThreads);
      dense_weights_kernel<format(), T, kNumThreads><<<grid, kNumThreads, 0, stream>>>(
          p.packed, static_cast<T*>(p.weights), p.n, p.k, num_threads);
    });
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
