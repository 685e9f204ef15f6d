#include "gemm/dense_weights.cuh"

namespace llamatelemetry {

Error launch_dense_weights_groups(const DenseWeightsParams& p, Stream stream) {
  return launch_dense_weights_of<FormatSet::kGroups>(p, stream);
}

}  // namespace llamatelemetry
