#include "gemm/product/wgmma_launch.cuh"

namespace llamatelemetry {

Error launch_product_wgmma_s8(const ProductParams& params, Stream stream) {
  return launch_wgmma_width<int8_t, true, true>(params, stream);
}

}  // namespace llamatelemetry
