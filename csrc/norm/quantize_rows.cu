#include "norm/quantize_rows.cuh"

namespace llamatelemetry {
namespace {

template <RowSource kSource>
Error start(const QuantizeRowsParams& p, Stream stream) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto bits = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.weight);
    const bool aligned = bits % 16 == 0 && p.row_size % kQuantizeChunk == 0 &&
                         p.x_row_stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
    quantize_rows_kernel<T, kSource>
        <<<dim3(static_cast<unsigned>(p.num_rows)), kQuantizeThreads, 0, stream>>>(p, aligned);
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
