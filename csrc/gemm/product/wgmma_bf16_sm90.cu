#include "gemm/product/wgmma_launch.cuh"

namespace llamatelemetry {

Error launch_product_wgmma_bf16(const ProductParams& params, Stream stream) {
  return launch_wgmma_layouts<BFloat16>(params, stream);
}

}  // namespace llamatelemetry
