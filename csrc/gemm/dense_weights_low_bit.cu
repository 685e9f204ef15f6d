#include "gemm/dense_weights.cuh"

namespace llamatelemetry {

Error launch_dense_weights_low_bit(const DenseWeightsParams& p, Stream stream) {
  return launch_dense_weights_of<FormatSet::kLowBit>(p, stream);
}

}  // namespace llamatelemetry
