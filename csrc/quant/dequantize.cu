#include "quant/dequantize.cuh"
#include "quant/params.h"

namespace llamatelemetry {

Error launch_dequantize(const DequantizeParams& p, Stream stream) {
  constexpr int kNumThreads = 256;
  dispatch_format(p.format, [&](auto format) {
    dispatch_dtype(p.dtype, [&](auto type) {
      using Format = Block<format()>;
      using T = typename decltype(type)::type;
      const int64_t quads_per_row = p.blocks_per_row * Format::kWeights / 4;
      const int64_t num_quads = p.num_rows * quads_per_row;
      const auto grid = static_cast<unsigned>((num_quads + kNumThreads - 1) / kNumThreads);
      dequantize_kernel<Format, T, kNumThreads><<<grid, kNumThreads, 0, stream>>>(
          p.data, static_cast<T*>(p.out), num_quads, quads_per_row, p.row_stride_bytes);
    });
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
