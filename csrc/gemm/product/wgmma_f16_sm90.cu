#include "gemm/product/wgmma_launch.cuh"

namespace llamatelemetry {

Error launch_product_wgmma_f16(const ProductParams& params, Stream stream) {
  return launch_wgmma_layouts<Half>(params, stream);
}

}  // namespace llamatelemetry
