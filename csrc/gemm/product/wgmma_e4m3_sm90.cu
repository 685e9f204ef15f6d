#include "gemm/product/wgmma_launch.cuh"

namespace llamatelemetry {

Error launch_product_wgmma_e4m3(const ProductParams& params, Stream stream) {
  return params.row_blocks ? launch_wgmma_width<E4M3, true, true, true>(params, stream)
                           : launch_wgmma_width<E4M3, true, true>(params, stream);
}

}  // namespace llamatelemetry
