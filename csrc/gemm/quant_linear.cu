#include "gemm/quant_linear.cuh"

namespace llamatelemetry {

int64_t quant_linear_workspace_bytes(const QuantLinearParams&) { return 0; }

Error launch_quant_linear(const QuantLinearParams& p, Stream stream) {
  const bool low_bit = is_low_bit(kFormats[p.format].codes);
  if (p.impl == QuantLinearImpl::kSkinny) {
    const bool is_half = p.dtype == DType::kFloat16;
    if (low_bit) {
      return is_half ? launch_quant_skinny_low_bit_f16(p, stream)
                     : launch_quant_skinny_low_bit_bf16(p, stream);
    }
    return is_half ? launch_quant_skinny_f16(p, stream) : launch_quant_skinny_bf16(p, stream);
  }
#ifdef LT_SM90
  if (p.impl == QuantLinearImpl::kWgmma) {
    switch (wgmma_tokens(p.m)) {
      case 16: return launch_quant_wgmma_16(p, stream);
      case 32: return launch_quant_wgmma_32(p, stream);
      case 64: return launch_quant_wgmma_64(p, stream);
      default: return launch_quant_wgmma_128(p, stream);
    }
  }
#endif
  if (low_bit) return launch_quant_linear_low_bit(p, stream);
  return launch_quant_linear_of<FormatSet::kWide>(p, stream);
}

}  // namespace llamatelemetry
