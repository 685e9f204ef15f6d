#include "gemm/quant_wgmma_launch.cuh"

namespace llamatelemetry {

Error launch_quant_wgmma_16(const QuantLinearParams& p, Stream stream) {
  return launch_quant_wgmma<16, FormatSet::kWide>(p, stream);
}

}  // namespace llamatelemetry
