#include "gemm/dense_weights.cuh"

namespace llamatelemetry {

Error launch_dense_weights(const DenseWeightsParams& p, Stream stream) {
  if (is_low_bit(kFormats[p.format].codes)) return launch_dense_weights_low_bit(p, stream);
  return launch_dense_weights_of<FormatSet::kWide>(p, stream);
}

}  // namespace llamatelemetry
