#include "gemm/quant_wgmma_launch.cuh"

namespace llamatelemetry {

Error launch_quant_wgmma_groups_256(const QuantLinearParams& p, const QuantWgmmaPlan& plan,
                                    Stream stream) {
  return launch_quant_wgmma<256, FormatSet::kGroups>(p, plan, stream);
}

}  // namespace llamatelemetry
