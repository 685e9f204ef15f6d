#include "gemm/dense_weights.cuh"

namespace llamatelemetry {

Error launch_dense_weights(const DenseWeightsParams& p, Stream stream) {
  switch (format_set(kFormats[p.format])) {
    case FormatSet::kLowBit: return launch_dense_weights_low_bit(p, stream);
    case FormatSet::kGroups: return launch_dense_weights_groups(p, stream);
    default: return launch_dense_weights_of<FormatSet::kWide>(p, stream);
  }
}

}  // namespace llamatelemetry
