#include "norm/quantize_rows.cuh"

namespace llamatelemetry {
namespace {

template <RowSource kSource>
Error start(const QuantizeRowsParams& p, Stream stream) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto bits = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.weight) |
                      reinterpret_cast<uintptr_t>(p.residual);
    const int64_t strides = p.x_row_stride | p.residual_row_stride;
    const bool aligned = bits % 16 == 0 && p.row_size % kQuantizeChunk == 0 &&
                         strides * static_cast<int64_t>(sizeof(T)) % 16 == 0;
    const dim3 grid(static_cast<unsigned>(p.num_rows));
    launch_overlapped(
        p.in_blocks ? quantize_blocks_kernel<T, kSource> : quantize_rows_kernel<T, kSource>, grid,
        kQuantizeThreads, stream, {p, aligned});
  });
  return last_launch_error();
}

}  // namespace

Error launch_quantize_rows(const QuantizeRowsParams& p, Stream stream) {
  return start<RowSource::kRow>(p, stream);
}

Error launch_quantize_made_rows(const QuantizeRowsParams& p, Stream stream) {
  return p.source == RowSource::kRmsNorm ? start<RowSource::kRmsNorm>(p, stream)
                                         : start<RowSource::kSiluAndMul>(p, stream);
}

}  // namespace llamatelemetry
