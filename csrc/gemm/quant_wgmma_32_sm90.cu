#include "gemm/quant_wgmma_launch.cuh"

namespace llamatelemetry {

Error launch_quant_wgmma_32(const QuantLinearParams& p, const QuantWgmmaPlan& plan, Stream stream) {
  return launch_quant_wgmma<32, FormatSet::kWide>(p, plan, stream);
}

const WgmmaClustersAtOnce& quant_wgmma_clusters_at_once() {
  constexpr WgmmaConfig kConfig = wgmma_config(32, WgmmaShape::kWide, kFormats[0].codes);
  return wgmma_clusters_at_once<QuantWgmma<BFloat16, 0, kConfig, false>>();
}

}  // namespace llamatelemetry
